# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The packed passes in torch: for any device, and without a C compiler.

On a CPU they work in place on pieces that fit into the cache. Tensors are dense.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...compat import torch as compat
from ..log_codes import quantize_to_levels, upper_bound

if TYPE_CHECKING:
    from ..fake_quantizer import Grid

FIELD_LEVELS = 15
_MIDDLE = 8
"""Field of a residual of zero."""
_PIECE = 1 << 17
"""Elements per thread and piece: fewer mean more calls, more mean cache misses."""


def pack(x: Tensor, scale: Tensor, grid: 'Grid') -> tuple[Tensor, Tensor, Tensor | None]:
    """``(values, codes, fields)``; codes contain the fields if both fit into a byte."""
    values = x / scale
    codes = torch.empty_like(values, dtype=torch.int8)
    field = codes if grid.is_narrow else torch.empty_like(codes)
    if isinstance(grid.zero_point, Tensor):
        _pack(values, codes, field, grid, torch.empty_like(values), torch.empty_like(values))
    else:
        scratch = _Scratch(values)
        for piece, code, mark in _pieces(values, codes, field):
            _pack(piece, code, mark, grid, scratch.like(piece, 0), scratch.like(piece, 1))
    return values.mul_(scale), codes, None if grid.is_narrow else field


def quantize(x: Tensor, scale: Tensor, grid: 'Grid') -> Tensor:
    """Values on the grid, shape of ``x``."""
    if grid.levels is not None:
        return quantize_to_levels(x / scale, grid.levels).mul_(scale)
    return _rounded(x / scale, grid).mul_(scale)


def unpack(codes: Tensor, scale: Tensor, grid: 'Grid') -> Tensor:
    """Values of packed codes, same shape."""
    return _centred(codes, grid).mul_(scale)


def backward(
    codes: Tensor, field: Tensor | None, grad: Tensor, scale: Tensor, grid: 'Grid', of_scale: bool
) -> tuple[Tensor, Tensor | None]:
    """``(grad_x, grad_scale)``; ``grad`` is overwritten."""
    field = codes & 15 if field is None else field
    if not of_scale:
        return _keep(grad, field.float(), grad), None
    if scale.dim() or isinstance(grid.zero_point, Tensor):
        return _backward_per_channel(codes, field, grad, scale, grid)
    scratch, total = _Scratch(grad), grad.new_zeros(())
    for piece, code, mark in _pieces(grad, codes, field):
        residual, steps, masked = (scratch.like(piece, i) for i in range(3))
        residual.copy_(mark)
        _keep(piece, residual, masked)
        steps.copy_(code >> 4 if grid.is_narrow else code)
        steps.sub_(grid.offset + grid.zero_point)
        total.add_(torch.dot(piece.sub_(masked), steps))
        total.sub_(torch.dot(masked, residual.sub_(_MIDDLE)), alpha=1 / FIELD_LEVELS)
        piece.copy_(masked)
    return grad, total


def softmax_backward(
    p: Tensor, grad: Tensor, scale: Tensor, grid: 'Grid', of_scale: bool
) -> tuple[Tensor, Tensor | None]:
    """``(grad_logits, grad_scale)``."""
    ratio = p / scale
    grad_p = torch.empty_like(grad)
    if grid.levels is None:
        _inside_only(grad, ratio, grid, grad_p)
    else:
        torch.mul(grad, ratio < upper_bound(grid.levels), out=grad_p)
    grad_scale = None
    if of_scale:
        codes = (
            _rounded(ratio.clone(), grid)
            if grid.levels is None
            else quantize_to_levels(ratio, grid.levels)
        )
        slope = (grad - grad_p).mul_(codes).addcmul_(codes.sub_(ratio), grad_p)
        grad_scale = slope.sum_to_size(scale.shape)
    return compat.softmax_backward(grad_p, p), grad_scale


def flat(x: Tensor) -> Tensor:
    """A dense tensor of any shape flattened in memory order, ``(elements,)``."""
    return x.as_strided((x.numel(),), (1,))


def _pack(
    values: Tensor, codes: Tensor, field: Tensor, grid: 'Grid', rounded: Tensor, residual: Tensor
) -> None:
    """Replace ratios by centred codes in place, and pack them; the last two are scratch buffers."""
    torch.round(values, out=rounded)
    torch.sub(values, rounded, out=residual)
    residual.mul_(FIELD_LEVELS).round_().clamp_(1 - _MIDDLE, FIELD_LEVELS - _MIDDLE).add_(_MIDDLE)
    _inside_only(residual, values, grid, residual)
    rounded.add_(grid.zero_point).clamp_(grid.qmin, grid.qmax)
    rounded.add_(values.sub_(values))  # NaN where the ratio is infinite
    torch.sub(rounded, grid.zero_point, out=values)
    if grid.is_narrow:
        residual.add_(rounded, alpha=16)
        codes.copy_(residual.add_(16 * grid.offset) if grid.offset else residual)
    else:
        field.copy_(residual)
        codes.copy_(rounded.add_(grid.offset))


def _rounded(ratio: Tensor, grid: 'Grid') -> Tensor:
    """Centred codes of ratios, in place."""
    ratio.round_().add_(grid.zero_point).clamp_(grid.qmin, grid.qmax)
    return ratio.sub_(grid.zero_point)


def _backward_per_channel(
    codes: Tensor, field: Tensor, grad: Tensor, scale: Tensor, grid: 'Grid'
) -> tuple[Tensor, Tensor]:
    residual = field.float()
    grad_x = _keep(grad, residual, torch.empty_like(grad))
    slope = (grad - grad_x).mul_(_centred(codes, grid))
    slope.sub_(residual.sub_(_MIDDLE).mul_(grad_x), alpha=1 / FIELD_LEVELS)
    return grad_x, slope.sum_to_size(scale.shape)


def _inside_only(x: Tensor, ratio: Tensor, grid: 'Grid', out: Tensor) -> None:
    """``out = x``, but 0 where the ratio is not strictly between the bounds."""
    low, high = grid.bounds
    if isinstance(grid.zero_point, Tensor):
        torch.mul(x, (ratio > low) & (ratio < high), out=out)
    else:  # the only fused "compare and select" of eager torch, ten times as fast on a CPU
        torch.ops.aten.hardtanh_backward.grad_input(x, ratio, low, high, grad_input=out)


def _keep(grad: Tensor, field: Tensor, out: Tensor) -> Tensor:
    """``out = grad``, but 0 where the field is 0."""
    return torch.ops.aten.threshold_backward.grad_input(grad, field, 0, grad_input=out)


def _centred(codes: Tensor, grid: 'Grid') -> Tensor:
    """Codes minus the zero point, float32."""
    centred = torch.empty_like(codes, dtype=torch.float32)
    for piece, code in _pieces(centred, codes):
        piece.copy_(code >> 4 if grid.is_narrow else code)
    return centred.sub_(grid.zero_point + grid.offset)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Dense tensors of one layout piece by piece, in memory order."""
    size = _piece_size(tensors[0])
    return zip(*(flat(t).split(size) for t in tensors), strict=True)


def _piece_size(x: Tensor) -> int:
    return max(x.numel(), 1) if x.is_cuda else _PIECE * torch.get_num_threads()


class _Scratch:
    """Reused float32 buffers of the size of a piece."""

    def __init__(self, x: Tensor) -> None:
        self.size = min(_piece_size(x), x.numel())
        self.template = x
        self.buffers: list[Tensor] = []

    def like(self, piece: Tensor, index: int) -> Tensor:
        """Buffer number ``index``, as long as ``piece``."""
        while len(self.buffers) <= index:
            self.buffers.append(self.template.new_empty(self.size))
        return self.buffers[index][: len(piece)]
