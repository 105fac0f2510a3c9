# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Style ``integer``: products of bytes in MatMulInteger and ConvInteger, rescaled once.

Sums are int32 and exact; they are converted, multiplied by one factor and shifted by the bias in
the order of the simulation, so each operation gives the same bits as ``ops.backends.exact``.
onnxruntime's kernels for CPUs without VNNI add two products of an unsigned and a signed byte in
16 bits, with saturation. Where two products of the largest codes do not fit, both bytes are
unsigned, for which its kernels widen first.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from ...ops import Operation, QuantMatMul
from ...ops.attention.relative_position import SharedQueryMatMul
from ...quantizers import FakeQuantizer
from ...quantizers.fake_quantizer import broadcast_shape
from ...quantizers.functional import positive_scale
from .nodes import Nodes, float_array
from .operand_nodes import Clipped, centred_bounds, clipped, log_levels_of
from .qdq_style import conv_attributes, float_layer_refusal

PAIR_LIMIT = (1 << 15) - 1
"""Largest sum of two products in 16 bits."""
SUM_LIMIT = (1 << 31) - 1
"""Largest magnitude of a sum in this style."""
BYTE = 255
COLUMNS = 'bnhwc,wkc->bnhwk'
"""Product of queries and a table of relative positions along the columns of the image."""


class ByteTensor(NamedTuple):
    """Integer codes as bytes; a centred code is ``bytes - zero_point``.

    Attributes:
        bytes: Value of the graph, or a constant's value, uint8 or int8.
        zero_point: Of the type of the bytes.
        scale: Scale of the codes: an array or a value of the graph.
    """

    bytes: Any
    zero_point: np.ndarray
    scale: Any


def refusal(operation: Operation) -> str:
    """Why an operation with calibrated quantizers has no integer form; empty if it has one."""
    return _product_refusal(operation) if operation.kind == 'matmul' else _layer_refusal(operation)


def precision(operation: Operation) -> str:
    """Types that an operation of this style multiplies: ``uint8 x int8``."""
    if operation.kind == 'matmul':
        lhs, rhs = operation.quantizers
        return f'uint8 x {_rhs_type(_largest_byte(lhs), rhs).__name__}'
    weight = _weight_codes(operation)
    unsigned = needs_unsigned(_largest_byte(operation.quantizers[0]), np.abs(weight).max())
    return f'uint8 x {"uint8" if unsigned else "int8"}'


def layer(nodes: Nodes, layer: Any, x: Any, bias: Any) -> Any:
    """Nodes of a linear layer or convolution.

    Args:
        nodes: Of the operation.
        layer: The layer.
        x: Value of the graph, its input.
        bias: Value of the graph, or None.
    """
    ndim = 4 if layer.kind == 'conv' else len(x.shape)
    weight, codes = _weight_codes(layer), layer.codes()['weight']
    nodes.reads('input', x)
    left, correction = _input_bytes(nodes, layer, x, ndim, weight)
    nodes.named(left.bytes, 'input.codes')
    right, zero_point = _weight_bytes(nodes, layer, weight)
    if layer.kind == 'conv':
        total = nodes(
            'ConvInteger',
            left.bytes,
            right,
            left.zero_point,
            zero_point,
            **conv_attributes(layer),
        )
    else:
        total = nodes('MatMulInteger', left.bytes, right, left.zero_point, zero_point)
    if correction is not None:
        total = nodes('Sub', total, correction)
    with torch.no_grad():
        input_scale = positive_scale(layer.input_quantizer.scale)
        factor = float_array(layer.output_scale(codes.scale, input_scale))
    out = nodes('Mul', nodes('Cast', total, to=1), factor)
    if bias is not None:
        if layer.kind == 'conv':
            bias = nodes('Reshape', bias, np.asarray([-1, 1, 1], np.int64))
        out = nodes('Add', out, bias)
    return nodes.named(out, 'output')


def product(nodes: Nodes, product: Any, lhs: Any, rhs: Any) -> Any:
    """Nodes of a product of two activations; arguments as for ``layer``."""
    left, right = product.quantizers
    rhs_type = _rhs_type(_largest_byte(left), right)
    nodes.reads('rhs', rhs)
    second = _bytes(nodes, clipped(nodes, right, rhs, len(rhs.shape)), rhs_type)
    nodes.named(second.bytes, 'rhs.codes')

    def multiply(first: Any, zero_point: np.ndarray) -> Any:
        return nodes('MatMulInteger', first, second.bytes, zero_point, second.zero_point)

    nodes.reads('lhs', lhs)
    if left.spec.is_log:
        digits, scale = log_levels_of(nodes, left, lhs)
        nothing = np.asarray(0, np.uint8)
        total = multiply(digits[0], nothing)
        nodes.named(digits[0], 'lhs.codes')
        if len(digits) == 2:
            high = nodes('Mul', multiply(digits[1], nothing), np.asarray(256, np.int32))
            nodes.named(digits[1], 'lhs.high_codes')
            total = nodes('Add', high, total)
    else:
        first = _bytes(nodes, clipped(nodes, left, lhs, len(lhs.shape)), np.uint8)
        nodes.named(first.bytes, 'lhs.codes')
        scale, total = first.scale, multiply(first.bytes, first.zero_point)
    if isinstance(scale, np.ndarray) and isinstance(second.scale, np.ndarray):
        out = nodes('Mul', nodes('Cast', total, to=1), np.asarray(scale * second.scale))
    else:
        # onnxruntime would fuse the product with both scales and multiply them one by one, which
        # rounds differently; the axis, which costs nothing, is not in its pattern
        axis, factor = np.asarray([0], np.int64), nodes('Mul', scale, second.scale)
        out = nodes('Mul', nodes('Cast', nodes('Unsqueeze', total, axis), to=1), factor)
        out = nodes('Squeeze', out, axis)
    return nodes.named(out, 'output')


def shared_product(nodes: Nodes, product: Any, codes: Any, rhs: Any, scale: Any) -> Any:
    """Nodes of a product whose left operand has codes already.

    Args:
        nodes: Of the operation.
        product: A product with the keys, or with a table of relative positions.
        codes: Value of the graph, centred codes in float32.
        rhs: Value of the graph.
        scale: Value of the graph, scale of the codes.
    """
    left, right = product.quantizers
    zero = np.asarray(-centred_bounds(left)[0], np.uint8)
    nodes.reads('lhs', codes)
    first = nodes.named(nodes('QuantizeLinear', codes, float_array(1.0), zero), 'lhs.codes')
    nodes.reads('rhs', rhs)
    grid = clipped(nodes, right, rhs, len(rhs.shape))
    second = _bytes(nodes, grid, _rhs_type(_largest_byte(left), right))
    values = nodes.named(second.bytes, 'rhs.codes')
    equation = getattr(product, 'equation', '')
    along_columns = equation == COLUMNS
    if equation:
        values = _table(nodes, values, rhs)
    if along_columns:
        first = nodes('Transpose', first, perm=[0, 1, 3, 2, 4])
    total = nodes('MatMulInteger', first, values, zero, second.zero_point)
    if along_columns:
        total = nodes('Transpose', total, perm=[0, 1, 3, 2, 4])
    axis, factor = np.asarray([0], np.int64), nodes('Mul', scale, second.scale)
    nodes.reads('factor', factor)
    total = nodes('Cast', nodes('Unsqueeze', total, axis), to=1)  # the axis: see product
    return nodes.named(nodes('Squeeze', nodes('Mul', factor, total), axis), 'output')


def _table(nodes: Nodes, values: Any, table: Any) -> Any:
    """Bytes of a table of relative positions as a right operand, ``(S, K, S)``.

    Args:
        nodes: Of the operation.
        values: Bytes of the table.
        table: The table, a value of the graph: ``(2 * S - 1, K)``, or ``(S, S, K)``.
    """
    if len(table.shape) == 2:
        steps = np.arange((table.shape[0] + 1) // 2)
        values = nodes('Gather', values, steps[:, None] - steps[None, :] + len(steps) - 1)
    return nodes('Transpose', values, perm=[0, 2, 1])


def centred(quantizer: FakeQuantizer, stored: np.ndarray, high: np.ndarray | None) -> np.ndarray:
    """Centred codes, or levels, of the bytes that a file of this style computes; int64.

    Args:
        quantizer: Of the operand.
        stored: Its bytes, ``(..., channels)`` or ``(B, channels, H, W)``.
        high: Higher bytes of wide levels, else None.
    """
    codes = stored.astype(np.int64)
    if quantizer.spec.is_log:
        return codes if high is None else codes + 256 * high.astype(np.int64)
    least, most = centred_bounds(quantizer)
    if most - least > BYTE:
        shape = broadcast_shape(quantizer.spec.granularity, stored.ndim)
        zero = quantizer.zero_point.cpu().numpy().astype(np.int64).reshape(shape)
        return codes + quantizer.spec.quant_range[0] - zero
    return codes + least if stored.dtype == np.uint8 else codes


def _bytes(nodes: Nodes, grid: Clipped, dtype: Any) -> ByteTensor:
    """Rounded codes; unsigned ones are shifted so that the smallest is 0."""
    zero_point = np.asarray(-grid.low if dtype is np.uint8 else 0, dtype)
    codes = nodes('QuantizeLinear', grid.value, grid.step, zero_point)
    return ByteTensor(codes, zero_point, grid.scale)


def _input_bytes(
    nodes: Nodes, layer: Any, x: Any, ndim: int, weight: np.ndarray
) -> tuple[ByteTensor, np.ndarray | None]:
    """Codes of a layer's input, and integers to subtract from the sums."""
    quantizer = layer.input_quantizer
    low, high = centred_bounds(quantizer)
    if high - low <= BYTE:
        return _bytes(nodes, clipped(nodes, quantizer, x, ndim), np.uint8), None
    # zero points of the channels differ by so much that no single one keeps all codes in a byte
    qmin, qmax = quantizer.spec.quant_range
    shape = broadcast_shape(quantizer.spec.granularity, ndim)
    zero = float_array(quantizer.zero_point).reshape(shape)
    scale = float_array(positive_scale(quantizer.scale)).reshape(shape)
    codes = nodes('Add', nodes('Round', nodes('Div', x, scale)), zero - np.float32(qmin))
    codes = nodes('Clip', codes, float_array(0.0), float_array(qmax - qmin))
    zeros = quantizer.zero_point.cpu().numpy().astype(np.int64) - qmin
    taps = weight.reshape(len(weight), len(zeros), -1).sum(-1)  # (out, in)
    correction = (taps @ zeros).astype(np.int32)
    if layer.kind == 'conv':
        correction = correction.reshape(-1, 1, 1)
    out = ByteTensor(nodes('Cast', codes, to=2), np.asarray(0, np.uint8), scale)
    return out, correction


def _weight_codes(layer: Any) -> np.ndarray:
    """Centred codes of a layer's weight, int64, in its shape."""
    with torch.no_grad():
        return layer.codes()['weight'].codes.cpu().numpy().astype(np.int64)


def _weight_bytes(nodes: Nodes, layer: Any, weight: np.ndarray) -> tuple[Any, np.ndarray]:
    """Constant of a weight's codes, and its zero point."""
    codes = weight if layer.kind == 'conv' else weight.T
    if needs_unsigned(_largest_byte(layer.input_quantizer), np.abs(weight).max()):
        zero_point = np.asarray(128, np.uint8)
        return nodes.constant((codes + 128).astype(np.uint8)), zero_point
    zero_point = np.asarray(0, np.int8)
    return nodes.constant(codes.astype(np.int8)), zero_point


def _largest_byte(quantizer: FakeQuantizer) -> int:
    """Largest unsigned byte of a left operand."""
    if quantizer.spec.is_log:
        largest = int(quantizer.levels.max())
        return largest if largest <= BYTE else BYTE
    low, high = centred_bounds(quantizer)
    return min(high - low, BYTE)


def needs_unsigned(byte: int, code: int) -> bool:
    """Whether two products could saturate in 16 bits."""
    return 2 * int(byte) * int(code) > PAIR_LIMIT


def _rhs_type(byte: int, rhs: FakeQuantizer) -> Any:
    low, high = centred_bounds(rhs)
    signed = low >= -128 and high <= 127 and not needs_unsigned(byte, max(-low, high))
    return np.int8 if signed else np.uint8


def _layer_refusal(layer: Any) -> str:
    low, high = centred_bounds(layer.input_quantizer)
    if max(map(abs, centred_bounds(layer.weight_quantizer))) > 128:
        return 'codes of the weight do not fit into a byte'
    if layer.input_quantizer.spec.is_log:
        return 'logarithmic codes of a layer'
    if layer.kind == 'conv' and high - low > BYTE and (layer.groups > 1 or any(layer.padding)):
        return 'zero points differ between channels of a padded or grouped convolution'
    return float_layer_refusal(layer)


def _product_refusal(product: Any) -> str:
    lhs, rhs = product.quantizers
    is_shared = isinstance(product, SharedQueryMatMul)
    if not is_shared and type(product).forward is not QuantMatMul.forward:
        return f'{type(product).__name__} computes its product in its own way'
    if rhs.spec.is_log or (is_shared and lhs.spec.is_log):
        return 'logarithmic codes on the right, or of a shared left operand'
    for quantizer in (lhs, rhs):
        low, high = centred_bounds(quantizer)
        if not quantizer.spec.is_log and high - low > BYTE:
            return 'zero points differ between vectors of 8-bit codes'
    return ''
