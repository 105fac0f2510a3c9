# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Inference on integer codes, carried out in floating point without rounding.

A float32 holds every integer up to 2^24. A product of codes is summed exactly
as long as the worst-case sum stays below that; above it float64 (2^53) is used.
"""

from typing import Any

import torch
from torch import Tensor

from ...quantizers import FakeQuantizer
from ...quantizers.log_codes import LARGEST_LEVEL
from ..dispatch import not_quantized, register_backend

FLOAT32_EXACT = 1 << 24


def accumulator_bound(lhs: FakeQuantizer, rhs: FakeQuantizer, depth: int) -> int:
    """Largest magnitude of a sum of ``depth`` products of centred codes."""
    return max_code(lhs) * max_code(rhs) * depth


def accumulator_dtype(lhs: FakeQuantizer, rhs: FakeQuantizer, depth: int) -> torch.dtype:
    """Float type in which ``depth`` products of codes sum without rounding.

    Args:
        lhs: Quantizer of one operand.
        rhs: Quantizer of the other.
        depth: Number of products in a sum (the GEMM's K).

    Examples:
        >>> from gplq_mm.quantizers import QuantSpec
        >>> a, w = FakeQuantizer(QuantSpec(num_bits=4)), FakeQuantizer(QuantSpec(num_bits=8))
        >>> accumulator_dtype(a, a, 3072), accumulator_dtype(w, w, 3072)
        (torch.float32, torch.float64)
    """
    exact = accumulator_bound(lhs, rhs, depth) <= FLOAT32_EXACT
    return torch.float32 if exact else torch.float64


def exact_total(total: Tensor, dtype: torch.dtype) -> Tensor:
    """A sum of code products as exact integers in ``dtype``, shape unchanged.

    On CUDA, convolutions may run by Winograd or FFT, whose sums are integers only
    up to rounding; they are rounded back.
    """
    total = total.to(dtype)
    return total.round_() if total.is_cuda else total


def max_code(quantizer: FakeQuantizer) -> int:
    """Largest magnitude of a centred code, or of a level of a logarithmic code.

    It is a bound from the spec: reading a quantizer's own table would synchronize the device.
    """
    if quantizer.spec.log_code is not None:
        return LARGEST_LEVEL[quantizer.spec.log_code, quantizer.spec.num_bits]
    qmin, qmax = quantizer.spec.quant_range
    if quantizer.spec.symmetric:
        return max(-qmin, qmax)
    return qmax - qmin


def refusal(operation: Any, x: Tensor, *rest: Any) -> str:
    """Why a call is not computed on codes but on dequantized values; empty if it is."""
    if torch.is_autocast_enabled(x.device.type):
        return 'autocast multiplies in half precision'
    return not_quantized(operation.quantizers)


def linear(layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """``layer.reference(x, bias)``, shapes as there, as an integer sum, rescaled once."""
    codes = layer.codes(x)
    (left, input_scale), (right, weight_scale) = codes['input'], codes['weight']
    dtype = accumulator_dtype(layer.input_quantizer, layer.weight_quantizer, layer.product_depth())
    total = exact_total(layer.product(left.to(dtype), right.to(dtype), None), left.dtype)
    out = total * layer.output_scale(weight_scale, input_scale)
    if bias is not None:
        out = out + layer.over_channels(bias)
    return out.to(x.dtype)


def matmul(operation: Any, lhs: Tensor, rhs: Tensor) -> Tensor:
    """``operation.reference(lhs, rhs)``, shapes as there, as an integer sum, rescaled once."""
    codes = operation.codes(lhs, rhs)
    (left, left_scale), (right, right_scale) = codes['lhs'], codes['rhs']
    dtype = accumulator_dtype(operation.lhs_quantizer, operation.rhs_quantizer, lhs.shape[-1])
    total = exact_total(operation.contract(left.to(dtype), right.to(dtype)), left.dtype)
    return (total * (left_scale * right_scale)).to(lhs.dtype)


def shared_query(operation: Any, q: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of the query ``(..., N, D)`` and their scale; the products after it sum integers."""
    return operation.products[0].lhs_quantizer.codes(q)


register_backend('exact', 'inference', ['linear', 'conv'], refusal, linear)
register_backend('exact', 'inference', ['matmul'], refusal, matmul)
register_backend('exact', 'inference', ['shared_query'], refusal, shared_query)
