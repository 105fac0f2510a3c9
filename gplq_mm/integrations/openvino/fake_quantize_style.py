# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Style for OpenVINO: products of integers in float, marked so that its CPU plugin runs int8.

The plugin multiplies int8 where both factors come from a FakeQuantize or from int8 constants. Here
a FakeQuantize of 256 levels and step 1 follows values that are integers already: it changes nothing
and fixes the type. Fewer levels, as 3 bits would have, and a FakeQuantize of weights fall back to
float32; the integers are clamped to the codes of the quantizer before.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from ...ops import Operation, QuantMatMul
from ...quantizers.fake_quantizer import broadcast_shape
from ...quantizers.functional import positive_scale
from ..onnx.integer_style import needs_unsigned
from ..onnx.nodes import Nodes, float_array
from ..onnx.operand_nodes import centred_bounds, clipped, log_power
from ..onnx.qdq_style import conv_attributes, float_layer_refusal

FAKE_QUANTIZE = 'gplq_mm.fake_quantize'
"""Key of the metadata of a Clip that becomes a FakeQuantize."""
WEIGHT = 'gplq_mm.weight'
"""Key of the metadata of a node whose second input ``export`` stores as integers."""
LEVELS = 256


class StoredWeight(NamedTuple):
    """Weight of a layer as it is stored.

    Attributes:
        codes: Centred codes, int8, in the layout of the product.
        factors: Factor per output channel, float32, broadcasts to the codes.
    """

    codes: np.ndarray
    factors: np.ndarray


def refusal(operation: Any) -> str:
    """Why an operation has no form in int8; empty if it has one."""
    left, right = operation.quantizers
    low, high = centred_bounds(left)
    most = max(map(abs, centred_bounds(right)))
    if most > 128:
        return 'codes do not fit into int8'
    if operation.kind == 'matmul':
        if type(operation).forward is not QuantMatMul.forward:
            return 'the product shares its quantized left operand'
        if right.spec.is_log or (not left.spec.is_log and max(-low, high) > 127):
            return 'codes do not fit into int8'
        largest = (
            LEVELS - 1 if left.spec.is_log else 128 + high
        )  # int8 is shifted to unsigned bytes
    else:
        if left.spec.is_log:
            return 'logarithmic codes of a layer'
        if operation.kind == 'conv' and any(getattr(operation, 'padding', ())) and high - low > 127:
            return 'codes of a padded convolution do not fit into int8'
        reason = float_layer_refusal(operation)
        if reason:
            return reason
        largest = min(high - low, 255)
    if needs_unsigned(largest, most):
        return 'two products of the largest codes saturate in 16 bits on CPUs without VNNI'
    return ''


def precision(operation: Operation) -> str:
    """Types that an operation of this style multiplies."""
    return 'uint8 x int8' if operation.kind != 'matmul' else 'int8 x int8'


class FakeQuantizeStyle:
    """The style of one export, which collects the integers of the weights.

    Attributes:
        weights: Integers of the layers written so far, by name of the layer.
    """

    SUM_LIMIT = (1 << 31) - 1
    """Sums are int32, then float32."""

    def __init__(self) -> None:
        self.weights: dict[str, StoredWeight] = {}

    refusal = staticmethod(refusal)
    precision = staticmethod(precision)

    def layer(self, nodes: Nodes, layer: Any, x: Any, bias: Any) -> Any:
        """Nodes of a linear layer or convolution; arguments as in ``onnx.integer_style``."""
        return _layer(nodes, layer, x, bias, self.weights)

    def product(self, nodes: Nodes, product: Any, lhs: Any, rhs: Any) -> Any:
        """Nodes of a product of two activations."""
        return _product(nodes, product, lhs, rhs)


def _layer(nodes: Nodes, layer: Any, x: Any, bias: Any, weights: dict[str, 'StoredWeight']) -> Any:
    is_conv = layer.kind == 'conv'
    with torch.no_grad():
        weight, scale = (t.cpu() for t in layer.codes()['weight'])
        factor = float_array(layer.output_scale(scale, positive_scale(layer.input_quantizer.scale)))
    codes, zero = _input_codes(nodes, layer, x, 4 if is_conv else len(x.shape))
    integers = weight.numpy().astype(np.int8)
    factors = factor[..., None] if is_conv else factor
    stored = integers if is_conv else integers.T
    weight = stored.astype(np.float32) * factors
    if is_conv:
        out = nodes('Conv', codes, weight, **conv_attributes(layer))
    else:
        out = nodes('MatMul', codes, weight)
    out.producer().metadata_props[WEIGHT] = nodes.operation
    weights[nodes.operation] = StoredWeight(stored, factors)
    shift = integers.reshape(len(integers), zero.shape[0], -1).sum(-1, np.int64) @ zero
    if shift.any():
        shift = shift.reshape((-1, 1, 1) if is_conv else -1)
        out = nodes('Sub', out, (shift * factor.astype(np.float64)).astype(np.float32))
    if bias is not None:
        bias = nodes('Reshape', bias, np.asarray([-1, 1, 1], np.int64)) if is_conv else bias
        out = nodes('Add', out, bias)
    return out


def _product(nodes: Nodes, product: Any, lhs: Any, rhs: Any) -> Any:
    left, right = product.quantizers
    grid = clipped(nodes, right, rhs, len(rhs.shape))
    second, scales = _integers(nodes, grid.value, grid.step, signed=True), [grid.scale]
    if left.spec.is_log:
        power, scale = log_power(nodes, left, lhs)
        level = nodes('Round', power)
        if int(left.levels.max()) <= 255:
            total = nodes('MatMul', fake_quantize(nodes, level, signed=False), second)
        else:
            high = nodes('Floor', nodes('Mul', level, float_array(1 / 256)))
            low = nodes('Sub', level, nodes('Mul', high, float_array(256)))
            parts = [
                nodes('MatMul', fake_quantize(nodes, part, signed=False), second)
                for part in (low, high)
            ]
            total = nodes('Add', parts[0], nodes('Mul', parts[1], float_array(256)))
    else:
        first = clipped(nodes, left, lhs, len(lhs.shape))
        codes, scale = _integers(nodes, first.value, first.step, signed=True), first.scale
        total = nodes('MatMul', codes, second)
    scales = [scale, *scales]
    if all(isinstance(s, np.ndarray) for s in scales):
        return nodes('Mul', total, np.asarray(scales[0] * scales[1]))
    return nodes('Mul', total, nodes('Mul', *scales))


def fake_quantize(nodes: Nodes, integers: Any, signed: bool) -> Any:
    """Integers of a byte, typed as such: a Clip that ``export`` makes a FakeQuantize."""
    low = -LEVELS // 2 if signed else 0
    out = nodes('Clip', integers, float_array(low), float_array(low + LEVELS - 1))
    out.producer().metadata_props[FAKE_QUANTIZE] = str(LEVELS)
    return out


def _integers(nodes: Nodes, value: Any, step: np.ndarray, signed: bool) -> Any:
    if step != 1:
        value = nodes('Div', value, step)
    return fake_quantize(nodes, nodes('Round', value), signed)


def _input_codes(nodes: Nodes, layer: Any, x: Any, ndim: int) -> tuple[Any, np.ndarray]:
    """Bytes of a layer's input, and their zero points: ``(1,)`` or ``(channels,)``, int64."""
    quantizer = layer.input_quantizer
    low, high = centred_bounds(quantizer)
    if high - low <= LEVELS - 1:
        signed = layer.kind == 'conv' and any(layer.padding)  # padding is 0
        grid = clipped(nodes, quantizer, x, ndim)
        value = grid.value if grid.step == 1 else nodes('Div', grid.value, grid.step)
        value = nodes('Round', value)
        if not signed and low:
            value = nodes('Sub', value, float_array(low))
        zero = np.asarray([0 if signed else -low], np.int64)
        return fake_quantize(nodes, value, signed), zero
    qmin, qmax = quantizer.spec.quant_range
    shape = broadcast_shape(quantizer.spec.granularity, ndim)
    zero = float_array(quantizer.zero_point).reshape(shape) - np.float32(qmin)
    scale = float_array(positive_scale(quantizer.scale)).reshape(shape)
    codes = nodes('Add', nodes('Round', nodes('Div', x, scale)), zero)
    codes = nodes('Clip', codes, float_array(0.0), float_array(qmax - qmin))
    return fake_quantize(nodes, codes, signed=False), zero.reshape(-1).astype(np.int64)
