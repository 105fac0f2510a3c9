# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Integer arithmetic carried out in floating point without rounding.

A float32 holds every integer up to 2^24. A product of codes is summed exactly
as long as the worst-case sum stays below that; above it float64 (2^53) is used.
"""

import torch
from torch import Tensor

from ..quantizers import FakeQuantizer
from ..quantizers.log_codes import LARGEST_LEVEL

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


def use_codes(x: Tensor, *quantizers: FakeQuantizer) -> bool:
    """Whether a layer multiplies integer codes: inference, all operands quantized, no autocast.

    With gradients, or under autocast, the layer multiplies the dequantized values
    instead; the two differ by floating-point rounding only.
    """
    if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return False
    return all(q.is_active for q in quantizers)


def max_code(quantizer: FakeQuantizer) -> int:
    """Largest magnitude of a centred code, or of a level of a logarithmic code.

    That of the spec, whatever table a search has chosen: reading it would wait for the device.
    """
    if quantizer.spec.log_code is not None:
        return LARGEST_LEVEL[quantizer.spec.log_code, quantizer.spec.num_bits]
    qmin, qmax = quantizer.spec.quant_range
    if quantizer.spec.symmetric:
        return max(-qmin, qmax)
    return qmax - qmin
