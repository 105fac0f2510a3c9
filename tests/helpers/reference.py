# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Integer quantization written a second time, in numpy with int64 codes and sums."""

import numpy as np
import torch
from torch import Tensor

from gplq_mm.quantizers import FakeQuantizer, PerChannel, PerRow, PerTensor

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


def steps(quantizer: FakeQuantizer, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point in float32, broadcast to `x`, by the stored state and `x` alone."""
    granularity = quantizer.spec.granularity
    scale, zero_point = quantizer.scale.detach().numpy(), quantizer.zero_point.numpy()
    if isinstance(granularity, PerRow):
        return _row_steps(quantizer, x.detach().numpy(), scale)
    if isinstance(granularity, PerChannel):
        shape = [1] * x.dim()
        shape[granularity.axis] = -1
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    return scale, zero_point


def _row_steps(
    quantizer: FakeQuantizer, x: np.ndarray, share: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    spec, axis = quantizer.spec, quantizer.spec.granularity.axis
    low = np.minimum(x.min(axis, keepdims=True), 0)
    high = np.maximum(x.max(axis, keepdims=True), 0)
    if spec.symmetric:
        extent = np.maximum(high, -low) if spec.signed else high
    else:
        extent = high - low
    scale = np.maximum(share * extent, np.float32(1e-9))
    if spec.symmetric:
        return scale, np.zeros_like(scale)
    first, last = bounds(spec.num_bits, spec.signed)
    middle = (high + low) * np.float32(0.5)
    centre = np.float32((first + last) / 2)
    return scale, np.clip(np.rint(centre - middle / scale), first, last)


def centred(quantizer: FakeQuantizer, x: Tensor) -> np.ndarray:
    """Codes minus zero point, or levels of a logarithmic code, as int64."""
    spec = quantizer.spec
    scale, zero_point = steps(quantizer, x)
    if spec.is_log:
        return _levels(x.detach().numpy() / scale, quantizer.levels.numpy().astype(np.int64))
    codes = int_codes(
        x,
        torch.from_numpy(scale),
        torch.from_numpy(zero_point),
        *bounds(spec.num_bits, spec.signed),
    )
    return codes - zero_point.astype(np.int64)


def _levels(ratio: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The last level whose geometric mean with the level before lies below the ratio."""
    middle = np.sqrt((levels[1:-1] * levels[2:]).astype(np.float64))
    first = levels[1] * np.sqrt(levels[1] / levels[2])
    edges = np.concatenate([[first], middle]).astype(np.float32)
    return levels[(ratio[..., None] > edges).sum(-1)]


def rescale(total: np.ndarray, factor: np.ndarray, bias: np.ndarray | None) -> Tensor:
    """Real output of integer sums, in float32."""
    assert total.dtype == np.int64
    out = total.astype(np.float32) * factor
    return torch.from_numpy(out if bias is None else out + bias)


def calibrated(quantizer: FakeQuantizer, x: Tensor) -> FakeQuantizer:
    """Set a quantizer's range to the extremes of `x`, by hand."""
    spec = quantizer.spec
    low, high = bounds(spec.num_bits, spec.signed)
    if isinstance(spec.granularity, PerRow):
        levels = high if spec.symmetric else high - low
        share = torch.tensor(1 / (int(quantizer.levels[-1]) if spec.is_log else levels))
        quantizer.set_qparams(share, torch.zeros(()))
        return quantizer
    if isinstance(spec.granularity, PerTensor):
        rows = x.detach().reshape(1, -1)
    else:
        axis = spec.granularity.axis
        rows = x.detach().movedim(axis, 0).reshape(x.shape[axis], -1)
    lo, hi = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    if spec.is_log:
        scale = hi / int(quantizer.levels[-1]) + 1e-9
        zero_point = torch.zeros_like(scale)
    elif spec.symmetric:
        scale = torch.maximum(hi, -lo) / high + 1e-6
        zero_point = torch.zeros_like(scale)
    else:
        scale = (hi - lo) / (high - low) + 1e-6
        zero_point = (low - lo / scale).round().clamp(low, high)
    quantizer.set_qparams(scale, zero_point)
    return quantizer
