# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Exact size and operations of a (partly) quantized model."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..ops import Operation, operations
from ..ptq.corrections.side_branch import compensated_blocks
from ..quantizers import FakeQuantizer
from .operands import KINDS, find_operands

FLOAT_BITS = 32


def model_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers when quantized weights are packed.

    A weight whose quantizer is active has ``num_bits`` per value and a float32 scale per
    output channel; an activation scale has 4 bytes and its zero point 1; an unfitted
    compensation has none; everything else has the size of its dtype.
    """
    quantizers = {id(t) for q in _quantizers(model) for t in q.state_dict(keep_vars=True).values()}
    quantizers |= {id(t) for t in _unfitted_branches(model)}
    rest = sum(
        t.numel() * t.element_size()
        for t in [*model.parameters(), *model.buffers()]
        if id(t) not in quantizers
    )
    packed = 0
    for weight, quantizer in _packed_weights(model):
        rest -= weight.numel() * weight.element_size()
        packed += -(-weight.numel() * quantizer.spec.num_bits // 8) + quantizer.scale.numel() * 4
    activation = sum(q.scale.numel() * 5 for q in _quantizers(model) if _is_active(q, 'activation'))
    return rest + packed + activation


@dataclass(frozen=True)
class MacCount:
    """Multiply-accumulates of one forward pass.

    Attributes:
        total: Number for the whole model.
        layers: Number for each quantized layer or matmul, by name.
    """

    total: int
    layers: dict[str, int]


def count_macs(model: nn.Module, run: Callable[[], Any]) -> MacCount:
    """Count the multiply-accumulates of one forward pass.

    The number of proposals of a detector depends on its scores: use one count for all stages.

    Args:
        model: Converted model, activation quantizers on.
        run: Runs the model once (for example on one image).
    """
    layers: dict[str, int] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(_counter(name, layers))
        for name in operations(model)
    ]
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            run()
    finally:
        for handle in handles:
            handle.remove()
    return MacCount(flops.get_total_flops() // 2, layers)


def bit_operations(model: nn.Module, count: MacCount) -> int:
    """Bit operations of a counted pass at the model's current bits.

    ``BOPs = MACs * bits of one operand * bits of the other``, 32 bits for a float operand (arXiv
    2005.07093, section 4).

    Args:
        model: Converted model; its active quantizers give the bits.
        count: Result of ``count_macs``.
    """
    found = operations(model)
    inside = sum(
        macs * math.prod(_bits(q) for q in found[name].quantizers)
        for name, macs in count.layers.items()
    )
    outside = max(count.total - sum(count.layers.values()), 0)
    return inside + outside * FLOAT_BITS * FLOAT_BITS


def mean_code_bits(model: nn.Module, elements: Mapping[str, int]) -> dict[str, float]:
    """Mean bits by kind over all values of the operands that a recipe quantizes.

    Args:
        model: Converted model; an operand whose quantizer is not active has 32 bits.
        elements: Result of ``count_elements``: values of each activation in one forward pass.

    Returns:
        ``weight`` and ``activation``; a kind without operands is left out.
    """
    totals = {kind: [0, 0] for kind in KINDS}
    for key, operand in find_operands(model).items():
        size = operand.weights or elements.get(key, 0)
        quantizer = model.get_submodule(operand.path)
        bits = operand.num_bits if quantizer.is_active else FLOAT_BITS
        totals[operand.kind][0] += size * bits
        totals[operand.kind][1] += size
    return {kind: bits / size for kind, (bits, size) in totals.items() if size}


def _counter(name: str, layers: dict[str, int]) -> Callable[..., None]:
    def hook(operation: Operation, inputs: tuple[Any, ...], output: Tensor) -> None:
        shapes = [x.shape for x in inputs if isinstance(x, Tensor)]
        layers[name] = layers.get(name, 0) + operation.macs(shapes, output.shape)

    return hook


def _bits(quantizer: FakeQuantizer) -> int:
    return quantizer.spec.num_bits if quantizer.is_active else FLOAT_BITS


def _quantizers(model: nn.Module) -> list[FakeQuantizer]:
    return [m for m in model.modules() if isinstance(m, FakeQuantizer)]


def _unfitted_branches(model: nn.Module) -> list[Tensor]:
    branches = [b.compensation for b in compensated_blocks(model).values()]
    return [t for b in branches if not b.is_fitted for t in b.buffers()]


def _is_active(quantizer: FakeQuantizer, kind: str) -> bool:
    return quantizer.kind == kind and quantizer.is_active


def _packed_weights(model: nn.Module) -> list[tuple[Tensor, FakeQuantizer]]:
    return [
        (operand.weight, operand.quantizer)
        for operation in operations(model).values()
        for operand in operation.operands().values()
        if operand.weight is not None and operand.quantizer.is_active
    ]
