# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Style ``qdq``: symmetric int8 codes between QuantizeLinear and DequantizeLinear.

TensorRT takes this form and no other. Centred codes need no zero point: asymmetric ones of 4 bits
lie between -15 and 15. The file is checked with onnx's checker and run with onnxruntime; it is
untested on TensorRT. Products are sums of rescaled values, so they equal the simulation's up to
rounding, not bit for bit. Logarithmic codes and asymmetric codes of 8 bits do not fit into int8
and stay float products of codes.
"""

from typing import Any

import numpy as np
import torch

from ...ops import Operation, QuantConv2d, QuantMatMul
from ...quantizers import FakeQuantizer
from .nodes import Nodes, float_array
from .operand_nodes import Clipped, centred_bounds, clipped

SUM_LIMIT = 1 << 53
"""Sums are float."""
_ZERO = np.asarray(0, np.int8)


def refusal(operation: Any) -> str:
    """Why an operation has no form in int8; empty if it has one."""
    for quantizer in operation.quantizers:
        if quantizer.spec.is_log:
            return 'logarithmic codes do not fit into int8'
        low, high = centred_bounds(quantizer)
        if low < -128 or high > 127:
            return f'centred codes from {low} to {high} do not fit into int8'
    if operation.kind == 'matmul':
        is_plain = type(operation).forward is QuantMatMul.forward
        return '' if is_plain else 'the product shares its quantized left operand'
    return float_layer_refusal(operation)


def float_layer_refusal(layer: Any) -> str:
    """Why a layer is not written as MatMul or Conv of its codes; empty if it can be."""
    if layer.kind == 'linear' or (isinstance(layer, QuantConv2d) and layer.can_pack):
        return ''
    return 'a transposed convolution, or padding with other values than 0'


def precision(operation: Operation) -> str:
    """Types that an operation of this style multiplies."""
    return 'int8 x int8'


def layer(nodes: Nodes, layer: Any, x: Any, bias: Any) -> Any:
    """Nodes of a linear layer or convolution; arguments as in ``integer_style``."""
    is_conv = layer.kind == 'conv'
    grid = clipped(nodes, layer.input_quantizer, x, 4 if is_conv else len(x.shape))
    with torch.no_grad():
        codes, scale = layer.codes()['weight']
    weight = codes.cpu().numpy().astype(np.int8)
    scales = float_array(scale).reshape(-1) if scale.numel() > 1 else float_array(scale.squeeze())
    zero_points = np.zeros(scales.shape, np.int8)
    axis = {'axis': 0 if is_conv else 1} if scales.ndim else {}
    weight = nodes.constant(weight if is_conv else weight.T)
    weight = nodes('DequantizeLinear', weight, scales, zero_points, **axis)
    left = on_grid(nodes, grid)
    if is_conv:
        out = nodes('Conv', left, weight, **conv_attributes(layer))
        bias = bias if bias is None else nodes('Reshape', bias, np.asarray([-1, 1, 1], np.int64))
    else:
        out = nodes('MatMul', left, weight)
    return out if bias is None else nodes('Add', out, bias)


def conv_attributes(layer: Any) -> dict[str, Any]:
    """Attributes of ONNX's Conv and ConvInteger."""
    return {
        'strides': list(layer.stride),
        'pads': [*layer.padding, *layer.padding],
        'dilations': list(layer.dilation),
        'group': layer.groups,
    }


def product(nodes: Nodes, product: Any, lhs: Any, rhs: Any) -> Any:
    """Nodes of a product of two activations."""
    grids = [
        clipped(nodes, quantizer, x, len(x.shape))
        for quantizer, x in zip(product.quantizers, (lhs, rhs), strict=True)
    ]
    out = nodes('MatMul', *(on_grid(nodes, grid) for grid in grids))
    for quantizer, grid in zip(product.quantizers, grids, strict=True):
        if _has_vector_scale(quantizer):
            out = nodes('Mul', out, grid.scale)
    return out


def on_grid(nodes: Nodes, grid: Clipped) -> Any:
    """QuantizeLinear to int8 and DequantizeLinear: values, or codes where the scale is a vector."""
    codes = nodes('QuantizeLinear', grid.value, grid.step, _ZERO)
    return nodes('DequantizeLinear', codes, grid.step, _ZERO)


def _has_vector_scale(quantizer: FakeQuantizer) -> bool:
    return quantizer.follows_rows or quantizer.scale.dim() > 0
