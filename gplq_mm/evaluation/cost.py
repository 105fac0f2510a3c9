# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Size and operations of a (partly) quantized model, counted exactly."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..algorithms.compensation import compensated_blocks
from ..modules import QuantConvTranspose2d, QuantizedLayer, QuantMatMul
from ..quantizers import FakeQuantizer

FLOAT_BITS = 32


def model_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers when quantized weights are packed.

    A weight whose quantizer is active takes ``num_bits`` per value and a float32 scale per
    output channel; an activation scale takes 4 bytes and its zero point 1; a compensation
    that was not fitted takes none; everything else takes the size of its dtype.
    """
    packed = _packed_weight_bytes(model)
    quantizers = {id(t) for q in _quantizers(model) for t in q.state_dict(keep_vars=True).values()}
    quantizers |= {id(t) for t in _unfitted_branches(model)}
    rest = sum(
        t.numel() * t.element_size()
        for t in [*model.parameters(), *model.buffers()]
        if id(t) not in quantizers
    )
    rest -= sum(w.numel() * w.element_size() for w in _packed_weights(model))
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

    The number of proposals in a detector's heads depends on its scores, so use one count for all
    stages instead of counting each stage.

    Args:
        model: Converted model, activation quantizers on.
        run: Runs the model once (say, on one image).
    """
    layers: dict[str, int] = {}
    handles = [
        m.register_forward_hook(_counter(n, layers))
        for n, m in model.named_modules()
        if isinstance(m, QuantizedLayer | QuantMatMul)
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
    inside = sum(
        macs * _operand_bits(model.get_submodule(name)) for name, macs in count.layers.items()
    )
    outside = max(count.total - sum(count.layers.values()), 0)
    return inside + outside * FLOAT_BITS * FLOAT_BITS


def _counter(name: str, layers: dict[str, int]) -> Callable[..., None]:
    def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, QuantMatMul):
            macs = output.numel() * inputs[0].shape[-1]
        elif isinstance(module, QuantConvTranspose2d):
            macs = inputs[0].numel() * module.weight[0].numel()
        else:
            macs = output.numel() * module.product_depth()
        layers[name] = layers.get(name, 0) + macs

    return hook


def _operand_bits(module: Any) -> int:
    if isinstance(module, QuantMatMul):
        return _bits(module.lhs_quantizer) * _bits(module.rhs_quantizer)
    return _bits(module.input_quantizer) * _bits(module.weight_quantizer)


def _bits(quantizer: FakeQuantizer) -> int:
    return quantizer.spec.num_bits if quantizer.is_active else FLOAT_BITS


def _quantizers(model: nn.Module) -> list[FakeQuantizer]:
    return [m for m in model.modules() if isinstance(m, FakeQuantizer)]


def _unfitted_branches(model: nn.Module) -> list[Tensor]:
    branches = [b.compensation for b in compensated_blocks(model).values()]
    return [t for b in branches if not b.is_fitted for t in b.buffers()]


def _is_active(quantizer: FakeQuantizer, kind: str) -> bool:
    return quantizer.kind == kind and quantizer.is_active


def _packed_layers(model: nn.Module) -> list[QuantizedLayer]:
    layers = [m for m in model.modules() if isinstance(m, QuantizedLayer)]
    return [m for m in layers if m.weight_quantizer.is_active]


def _packed_weights(model: nn.Module) -> list[Tensor]:
    return [layer.weight for layer in _packed_layers(model)]


def _packed_weight_bytes(model: nn.Module) -> int:
    total = 0
    for layer in _packed_layers(model):
        quantizer = layer.weight_quantizer
        total += -(-layer.weight.numel() * quantizer.spec.num_bits // 8)
        total += quantizer.scale.numel() * 4
    return total
