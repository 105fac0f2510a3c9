# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Integer quantization written a second time, in numpy with int64 codes and sums."""

import numpy as np
import torch
from torch import Tensor

from gplq_mm.quantizers import FakeQuantizer, PerTensor

BITS = range(2, 9)
SCHEMES = [(True, True), (True, False), (False, True), (False, False)]
"""`(signed, symmetric)`."""


def bounds(num_bits: int, signed: bool) -> tuple[int, int]:
    """Smallest and largest code."""
    low = -(1 << (num_bits - 1)) if signed else 0
    return low, low + (1 << num_bits) - 1


def int_codes(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> np.ndarray:
    """Codes as int64; scale and zero point broadcast to `x`."""
    ratio = x.detach().numpy() / scale.detach().numpy()
    nearest = np.rint(np.clip(ratio, -1e9, 1e9)).astype(np.int64)
    return np.clip(nearest + zero_point.numpy().astype(np.int64), low, high)


def centred(quantizer: FakeQuantizer, x: Tensor) -> np.ndarray:
    """Codes minus zero point as int64, by the quantizer's stored state alone."""
    spec, scale, zero_point = quantizer.spec, quantizer.scale, quantizer.zero_point
    if not isinstance(spec.granularity, PerTensor):
        shape = [1] * x.dim()
        shape[spec.granularity.axis] = -1
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    codes = int_codes(x, scale, zero_point, *bounds(spec.num_bits, spec.signed))
    return codes - zero_point.numpy().astype(np.int64)


def rescale(total: np.ndarray, factor: np.ndarray, bias: np.ndarray | None) -> Tensor:
    """Real output of integer sums, in float32."""
    assert total.dtype == np.int64
    out = total.astype(np.float32) * factor
    return torch.from_numpy(out if bias is None else out + bias)


def calibrated(quantizer: FakeQuantizer, x: Tensor) -> FakeQuantizer:
    """Set a quantizer's range to the extremes of `x`, by hand."""
    spec = quantizer.spec
    low, high = bounds(spec.num_bits, spec.signed)
    if isinstance(spec.granularity, PerTensor):
        rows = x.detach().reshape(1, -1)
    else:
        axis = spec.granularity.axis
        rows = x.detach().movedim(axis, 0).reshape(x.shape[axis], -1)
    lo, hi = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    if spec.symmetric:
        scale = torch.maximum(hi, -lo) / high + 1e-6
        zero_point = torch.zeros_like(scale)
    else:
        scale = (hi - lo) / (high - low) + 1e-6
        zero_point = (low - lo / scale).round().clamp(low, high)
    quantizer.set_qparams(scale, zero_point)
    return quantizer
