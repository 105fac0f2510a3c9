# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Quantized tensors as integer codes: all that the backward pass of LSQ needs.

An element of at most 4 bits takes one byte: its code in the upper half, in the lower
half a *field* with the rounding residual ``r - round(r)`` of ``r = x / scale`` in 15
levels (1 to 15), or 0 where ``r`` lies outside LSQ's range (a code at the bound does not
tell). 5 to 8 bits take a byte for the code and half a byte for the field.

From these the backward pass has the dequantized value and the range mask exactly, and
each element's share of the scale's gradient up to ``|gradient| * RESIDUAL_ERROR``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FIELD_LEVELS = 15
RESIDUAL_ERROR = 1 / (2 * FIELD_LEVELS)
"""Largest error of a stored rounding residual, in steps of the grid."""
_MIDDLE = 8
"""Field of a residual of zero."""


class Grid(NamedTuple):
    """Integer grid of a quantizer.

    Attributes:
        qmin: Smallest code.
        qmax: Largest code.
        zero_point: Code of real zero: a number, or a tensor that broadcasts.
    """

    qmin: int
    qmax: int
    zero_point: float | Tensor

    @property
    def is_narrow(self) -> bool:
        """Whether a code fits half a byte."""
        return self.qmax - self.qmin < 16

    @property
    def offset(self) -> int:
        """What is added to a code so that it fits a signed half byte or byte."""
        if self.qmin < 0:
            return 0
        return -8 if self.is_narrow else -128


def quantize_packed(x: Tensor, scale: Tensor, grid: Grid) -> tuple[Tensor, list[Tensor]]:
    """Values of ``x`` on the grid, and the bytes that stand for them in the backward pass.

    Args:
        x: Real values in float32, any shape and dense layout.
        scale: Positive step size, broadcastable to ``x``.
        grid: Codes allowed.

    Returns:
        ``(values, packed)``: values equal those of ``fake_quantize_ste`` bit for bit;
        packed is one int8 tensor of the shape of ``x``, with a second, flat one of half
        the size for more than 4 bits.

    Examples:
        >>> grid = Grid(-8, 7, 0.0)
        >>> values, packed = quantize_packed(torch.tensor([0.6, 9.0]), torch.tensor(0.5), grid)
        >>> values, packed[0] >> 4, packed[0] & 15  # residual 0.2 is level 8 + 3; 9.0 is outside
        (tensor([0.5000, 3.5000]), tensor([1, 7], dtype=torch.int8), tensor([11,  0], dtype=torch.int8))
    """
    ratio = x / scale
    codes = torch.round(ratio)
    field = (ratio - codes).mul_(FIELD_LEVELS).round_().clamp_(1 - _MIDDLE, FIELD_LEVELS - _MIDDLE)
    field = _inside_only(field.add_(_MIDDLE), ratio, grid)
    del ratio
    shifted = not (isinstance(grid.zero_point, float) and grid.zero_point == 0)
    if shifted:
        codes.add_(grid.zero_point)
    codes.clamp_(grid.qmin, grid.qmax)
    packed = _pack(codes, field, grid)
    if shifted:
        codes.sub_(grid.zero_point)
    return codes.mul_(scale), packed


def unpack_values(packed: Sequence[Tensor], scale: Tensor, grid: Grid) -> Tensor:
    """The values that were packed, exactly, in float32."""
    return _centred(packed, grid).mul_(scale)


def packed_backward(
    packed: Sequence[Tensor], grad: Tensor, grid: Grid, scale_shape: torch.Size | None
) -> tuple[Tensor, Tensor | None]:
    """LSQ's gradients of the input and the scale.

    Args:
        packed: What ``quantize_packed`` returned.
        grad: Gradient of the values.
        grid: Codes allowed.
        scale_shape: Shape of the scale as it broadcast; None if it needs no gradient.

    Returns:
        ``(grad_x, grad_scale)``. The first is exact. The second is off by at most
        ``RESIDUAL_ERROR * sum(|grad|)`` over the elements that share the scale.

    Source: LSQ (arXiv 1902.08153), equations 1 to 3.
    """
    grad = grad.float()
    field = _field(packed)
    grad_x = _threshold_backward(grad, field, -_MIDDLE)
    if scale_shape is None:
        return grad_x, None
    outside = grad - grad_x
    codes = _centred(packed, grid)
    if not scale_shape:
        inner = _inner(grad_x, field)
        return grad_x, _inner(outside, codes).sub_(inner.div_(FIELD_LEVELS))
    slope = outside.mul_(codes).sub_(field.mul_(grad_x).div_(FIELD_LEVELS))
    return grad_x, slope.sum_to_size(scale_shape)


def ratio_backward(
    ratio: Tensor, codes: Tensor, grad: Tensor, grid: Grid, scale_shape: torch.Size | None
) -> tuple[Tensor, Tensor | None]:
    """LSQ's gradients where nothing had to be packed; both exact.

    Args:
        ratio: ``x / scale``.
        codes: Its centred codes; overwritten.
        grad: Gradient of the values.
        grid: Codes allowed.
        scale_shape: Shape of the scale as it broadcast; None if it needs no gradient.

    Returns:
        ``(grad_x, grad_scale)``.
    """
    grad = grad.float()
    grad_x = _inside_only(grad, ratio, grid)
    if scale_shape is None:
        return grad_x, None
    outside = grad - grad_x
    if not scale_shape:
        total = _inner(outside, codes)
        return grad_x, total.add_(_inner(grad_x, codes.sub_(ratio)))
    slope = outside.mul_(codes).addcmul_(codes.sub_(ratio), grad_x)
    return grad_x, slope.sum_to_size(scale_shape)


def _inside_only(field: Tensor, ratio: Tensor, grid: Grid) -> Tensor:
    """``field``, but 0 where the ratio is not strictly between the bounds."""
    zero_point = grid.zero_point
    if isinstance(zero_point, float):
        # the one fused "compare and keep" of eager torch: grad of a clamp
        low, high = grid.qmin - zero_point, grid.qmax - zero_point
        return torch.ops.aten.hardtanh_backward(field, ratio, low, high)
    return field * ((ratio > grid.qmin - zero_point) & (ratio < grid.qmax - zero_point))


def _threshold_backward(grad: Tensor, x: Tensor, threshold: float) -> Tensor:
    """``grad`` where ``x > threshold``, else 0; faster than ``where`` on a CPU."""
    return torch.ops.aten.threshold_backward(grad, x, threshold)


def _pack(codes: Tensor, field: Tensor, grid: Grid) -> list[Tensor]:
    if grid.is_narrow:
        return [_to_int8(field.add_(codes, alpha=16), 16 * grid.offset)]
    flat = _to_int8(field, 0).flatten()
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    pairs = flat.view(-1, 2)
    return [_to_int8(codes.clone(), grid.offset), pairs[:, 0] + pairs[:, 1] * 16]


def _to_int8(x: Tensor, offset: int) -> Tensor:
    return (x.add_(offset) if offset else x).to(torch.int8)


def _centred(packed: Sequence[Tensor], grid: Grid) -> Tensor:
    """Codes minus the zero point, float32."""
    codes = packed[0] >> 4 if grid.is_narrow else packed[0]
    codes = codes.to(torch.float32)
    offset = grid.offset + grid.zero_point
    if isinstance(offset, float) and offset == 0:
        return codes
    return codes.sub_(offset)


def _field(packed: Sequence[Tensor]) -> Tensor:
    """Field minus 8: fifteenths of a step, -8 outside; float32."""
    if len(packed) == 1:
        return (packed[0] & 15).to(torch.float32).sub_(_MIDDLE)
    pairs = torch.stack([packed[1] & 15, (packed[1] >> 4) & 15], dim=1)
    flat = pairs.flatten()[: packed[0].numel()].view(packed[0].shape)
    return flat.to(torch.float32).sub_(_MIDDLE)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Sum of products of two tensors of one shape."""
    if a.is_contiguous() and b.is_contiguous():
        return torch.dot(a.view(-1), b.view(-1))
    return (a * b).sum()
