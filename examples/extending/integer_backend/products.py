# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Linear layers and products of two activations as int64 sums, rescaled once."""

import torch
from torch import Tensor

from gplq_mm.ops import Operation, QuantizedLayer, QuantMatMul, not_quantized


def refusal(operation: Operation, x: Tensor, *rest: Tensor | None) -> str:
    """Why a call is left to another backend; empty if it is taken."""
    if x.device.type != 'cpu':
        return 'int64 products need a CPU'
    if torch.is_autocast_enabled('cpu'):
        return 'autocast multiplies in half precision'
    return not_quantized(operation.quantizers)


def linear(layer: QuantizedLayer, x: Tensor, bias: Tensor | None) -> Tensor:
    """``layer.reference(x, bias)``; ``(..., in)`` -> ``(..., out)``."""
    codes = layer.codes(x)
    (left, input_scale), (right, weight_scale) = codes['input'], codes['weight']
    total = left.long() @ right.long().t()
    out = total.to(left.dtype) * layer.output_scale(weight_scale, input_scale)
    return (out if bias is None else out + bias).to(x.dtype)


def matmul(product: QuantMatMul, lhs: Tensor, rhs: Tensor) -> Tensor:
    """``product.reference(lhs, rhs)``; ``(..., N, K) @ (..., K, M)``."""
    codes = product.codes(lhs, rhs)
    (left, left_scale), (right, right_scale) = codes['lhs'], codes['rhs']
    total = product.contract(left.long(), right.long())
    return (total.to(left.dtype) * (left_scale * right_scale)).to(lhs.dtype)
