# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Comparison of an exported file with the simulation, operation by operation.

Given equal inputs, an operation of style ``integer`` gives the same codes and the same output, bit
for bit. Over a whole model LayerNorm, GELU and softmax of another runtime differ in the last bits,
and a value that lies between two codes then gets the other one: these codes are counted.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from ...ops import operations
from ...ops.attention.relative_position import by_pairs
from ...ops.backends import exact
from . import integer_style
from .nodes import GIVES, OPERATION, READS
from .onnx_model import run_with_outputs


class Agreement(NamedTuple):
    """How one operation of a file agrees with the simulation.

    Attributes:
        operation: Its name.
        num_codes: Codes of its activations that were compared.
        flips: Codes that differ although both got the same input.
        flips_of_model: Codes that differ where each got the input of its own model.
        equal_output: Whether the outputs are equal bit for bit, given equal inputs.
    """

    operation: str
    num_codes: int
    flips: int
    flips_of_model: int
    equal_output: bool


def compare(
    model: nn.Module, path: str | Path, images: Tensor, owner: nn.Module | None = None
) -> list[Agreement]:
    """Compare a file of style ``integer`` with the model it was exported from.

    Args:
        model: Module that was exported.
        path: The file.
        images: Normalized images, ``(B, 3, H, W)``.
        owner: As in ``export``.

    Returns:
        One entry per operation that the file computes on integers, in the file's order.

    Raises:
        ModuleNotFoundError: If onnxruntime is missing.
        ValueError: If the file has no such operation, or another model's.
    """
    proto = onnx.load(path)
    parts = _parts(proto)
    known = operations(owner or model)
    if not parts or not set(parts) <= set(known):
        raise ValueError(
            f'{path} holds {len(parts)} operations of gplq_mm, not those of this model; give the '
            "file that export(model, ..., style='integer') wrote"
        )
    names = [value for own in parts.values() for value in own.values()]
    constants = {x.name: onnx.numpy_helper.to_array(x) for x in proto.graph.initializer}
    values = run_with_outputs(proto, [n for n in names if n not in constants], images)
    values.update({n: constants[n].copy() for n in names if n in constants})
    simulated = _simulated_codes(model, {name: known[name] for name in parts}, images)
    return [
        _agreement(name, known[name], {k: values[v] for k, v in own.items()}, simulated[name])
        for name, own in parts.items()
    ]


def top1_agreement(first: Tensor, second: Tensor) -> float:
    """Share of images to which two models give the same class, from logits ``(B, classes)``."""
    return float((first.argmax(-1) == second.argmax(-1)).float().mean())


def _parts(proto: onnx.ModelProto) -> dict[str, dict[str, str]]:
    """Operation -> names of the values of its operands, codes and output."""
    parts: dict[str, dict[str, str]] = {}
    for node in proto.graph.node:
        marks = _marks(node)
        if OPERATION not in marks:
            continue
        own = parts.setdefault(marks[OPERATION], {})
        if READS in marks:
            own[marks[READS]] = node.input[0]
        if GIVES in marks:
            own[marks[GIVES]] = node.output[0]
            if marks[GIVES] == 'output' and node.op_type == 'Add':
                own['bias'] = node.input[1]
    producers = {output: node for node in proto.graph.node for output in node.output}
    for node in reversed(proto.graph.node):
        if node.op_type in ('MatMulInteger', 'ConvInteger') and (own := _owned(node, parts)):
            right = _before_transpose(node.input[1], producers)
            is_product = 'factor' in own or _kind(right, producers) == 'QuantizeLinear'
            sides = ('lhs', 'rhs') if is_product else ('input',)
            if 'factor' in own and 'rhs' not in own:  # a table of relative positions is a constant
                own['rhs.table'], sides = node.input[1], ('lhs',)
            for side, value in zip(sides, node.input, strict=False):
                codes = _before_transpose(value, producers)
                own.setdefault(f'{side}.codes', codes)
                if side not in own:
                    own[side] = _source(codes, producers)
    return parts


def _kind(value: str, producers: Mapping[str, onnx.NodeProto]) -> str:
    return producers[value].op_type if value in producers else ''


def _before_transpose(value: str, producers: Mapping[str, onnx.NodeProto]) -> str:
    is_transposed = _kind(value, producers) == 'Transpose'
    return producers[value].input[0] if is_transposed else value


def _marks(node: onnx.NodeProto) -> dict[str, str]:
    return {p.key: p.value for p in node.metadata_props}


def _owned(node: onnx.NodeProto, parts: dict[str, dict[str, str]]) -> dict[str, str]:
    return parts.get(_marks(node).get(OPERATION, ''), {})


def _source(codes: str, producers: Mapping[str, onnx.NodeProto]) -> str:
    """Value that codes are made of, where another operation with equal scales makes them too."""
    node = producers[codes]
    while READS not in _marks(node):
        node = producers[node.input[1 if node.op_type == 'Gather' else 0]]
    return node.input[0]


@torch.no_grad()
def _simulated_codes(
    model: nn.Module, compared: Mapping[str, Any], images: Tensor
) -> dict[str, dict[str, np.ndarray]]:
    codes: dict[str, dict[str, np.ndarray]] = {}

    def watch(name: str) -> Any:
        def hook(operation: Any, inputs: Sequence[Any]) -> None:
            tensors = [x for x in inputs if isinstance(x, Tensor)]
            codes[name] = _codes(operation, tensors)
            if len(tensors) == 3 and operation.kind == 'matmul':  # codes, and their scale
                codes[name]['lhs'] = tensors[0].cpu().numpy().astype(np.int64)

        return hook

    handles = [o.register_forward_pre_hook(watch(name)) for name, o in compared.items()]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return codes


def _codes(operation: Any, inputs: Sequence[Tensor]) -> dict[str, np.ndarray]:
    names = [n for n, operand in operation.operands().items() if operand.weight is None]
    quantizers = [operation.operands()[n].quantizer for n in names]
    return {
        name: quantizer.codes(x)[0].cpu().numpy().astype(np.int64)
        for name, quantizer, x in zip(names, quantizers, inputs, strict=False)
    }


@torch.no_grad()
def _agreement(
    name: str, operation: Any, values: Mapping[str, np.ndarray], simulated: Mapping[str, np.ndarray]
) -> Agreement:
    if 'factor' in values:
        return _shared_agreement(name, operation, values, simulated)
    operands = [n for n, operand in operation.operands().items() if operand.weight is None]
    inputs = [torch.from_numpy(values[n]) for n in operands]
    expected = _codes(operation, inputs)
    num_codes = flips = of_model = 0
    for operand in operands:
        quantizer = operation.operands()[operand].quantizer
        stored, high = values[f'{operand}.codes'], values.get(f'{operand}.high_codes')
        found = integer_style.centred(quantizer, stored, high)
        num_codes += found.size
        flips += int((found != expected[operand]).sum())
        of_model += int((found != simulated[operand]).sum())
    if operation.kind == 'matmul':
        out = exact.matmul(operation, *inputs)
    else:
        bias = torch.from_numpy(values['bias']).flatten() if 'bias' in values else None
        out = exact.linear(operation, inputs[0], bias)
    equal = np.array_equal(out.numpy(), values['output'])
    return Agreement(name, num_codes, flips, of_model, equal)


def _shared_agreement(
    name: str, operation: Any, values: Mapping[str, np.ndarray], simulated: Mapping[str, np.ndarray]
) -> Agreement:
    """The same for a product whose left operand is given as codes."""
    quantizer = operation.rhs_quantizer
    left = torch.from_numpy(values['lhs'])
    of_model = int((values['lhs'] != simulated['lhs']).sum())
    if 'rhs.table' in values:
        expected = by_pairs(torch.from_numpy(simulated['rhs']))
        stored = values['rhs.table'].transpose(0, 2, 1)
    else:
        expected = quantizer.codes(torch.from_numpy(values['rhs']))[0].long()
        stored = values['rhs.codes']
    found = integer_style.centred(quantizer, stored, None)
    lhs = integer_style.centred(operation.lhs_quantizer, values['lhs.codes'], None)
    flips = int((found != expected.numpy()).sum() + (lhs != values['lhs']).sum())
    if 'rhs.table' not in values:
        of_model += int((found != simulated['rhs']).sum())
    total = operation.total(left, expected.to(left.dtype))
    out = total * torch.from_numpy(values['factor'])
    equal = np.array_equal(out.numpy(), values['output'])
    return Agreement(name, found.size + lhs.size, flips, of_model, equal)
