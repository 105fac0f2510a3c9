# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Shifted windows of Swin as single nodes of a captured graph, for images of any size.

The library computes padding, windows and masks in Python from the size of the feature map. Here
each is one custom torch op, whose translation computes the same from the size that the graph gets.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from onnxscript import opset21 as op
from torch import Tensor

MASKED = -100.0
"""What mmdet and mmpretrain add to logits of tokens that are no neighbours in the image."""
_END = np.iinfo(np.int64).max


def _up(length: Any, step: int) -> Any:
    """``length`` rounded up to a multiple of ``step``."""
    return (length + step - 1) // step * step


@torch.library.custom_op('gplq_mm::padded', mutates_args=())
def padded(x: Tensor, rows: int, columns: int) -> Tensor:
    """``(B, C, H, W)`` with zeros at the bottom and at the right, up to multiples of two steps."""
    height, width = x.shape[2:]
    return F.pad(x, (0, _up(width, columns) - width, 0, _up(height, rows) - height)).clone()


@padded.register_fake
def _(x: Tensor, rows: int, columns: int) -> Tensor:
    return x.new_empty(*x.shape[:2], _up(x.shape[2], rows), _up(x.shape[3], columns))


@torch.library.custom_op('gplq_mm::windows', mutates_args=())
def windows(x: Tensor, size: int, shift: int) -> Tensor:
    """``(B, H, W, C)``, padded with zeros and shifted, as ``(B * windows, size * size, C)``."""
    B, H, W, C = x.shape
    x = F.pad(x, (0, 0, 0, _up(W, size) - W, 0, _up(H, size) - H))
    x = torch.roll(x, (-shift, -shift), (1, 2))
    x = x.view(B, x.shape[1] // size, size, x.shape[2] // size, size, C)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, size * size, C)


@windows.register_fake
def _(x: Tensor, size: int, shift: int) -> Tensor:
    B, H, W, C = x.shape
    return x.new_empty(B * (_up(H, size) // size) * (_up(W, size) // size), size * size, C)


@torch.library.custom_op('gplq_mm::merged', mutates_args=())
def merged(windowed: Tensor, like: Tensor, size: int, shift: int) -> Tensor:
    """The inverse of ``windows``: ``(B * windows, size * size, C)`` in the shape of ``like``."""
    B, H, W, C = like.shape
    rows, columns = _up(H, size) // size, _up(W, size) // size
    x = windowed.reshape(B, rows, columns, size, size, C).permute(0, 1, 3, 2, 4, 5)
    x = torch.roll(x.reshape(B, rows * size, columns * size, C), (shift, shift), (1, 2))
    return x[:, :H, :W].clone(memory_format=torch.contiguous_format)


@merged.register_fake
def _(windowed: Tensor, like: Tensor, size: int, shift: int) -> Tensor:
    return windowed.new_empty(like.shape)


@torch.library.custom_op('gplq_mm::window_mask', mutates_args=())
def window_mask(x: Tensor, size: int, shift: int) -> Tensor:
    """``MASKED`` or 0 for each pair of tokens of a window of ``x``, ``(windows, N, N)``."""
    height, width = _up(x.shape[1], size), _up(x.shape[2], size)
    regions = 3 * _regions(height, size, shift)[:, None] + _regions(width, size, shift)
    of_window = windows(regions[None, :, :, None].float(), size, 0).squeeze(-1)
    return torch.where(of_window.unsqueeze(1) == of_window.unsqueeze(2), 0.0, MASKED)


@window_mask.register_fake
def _(x: Tensor, size: int, shift: int) -> Tensor:
    count = (_up(x.shape[1], size) // size) * (_up(x.shape[2], size) // size)
    return x.new_empty(count, size * size, size * size)


def _regions(length: int, size: int, shift: int) -> Tensor:
    """0, 1 or 2: before the last window, in its first part, in the part that comes from the start.

    ``(length,)``, along one axis.
    """
    index = torch.arange(length)
    return (index >= length - size).long() + (index >= length - shift).long()


def _ints(*values: int) -> Any:
    return op.Constant(value_ints=values)


def _length(x: Any, axis: int) -> Any:
    """Size of an axis, ``(1,)``."""
    return op.Shape(x, start=axis, end=axis + 1)


def _steps(length: Any, size: int) -> Any:
    """``length / size``, rounded up."""
    return op.Div(op.Add(length, _ints(size - 1)), _ints(size))


def _rolled(x: Any, shift: int, axis: int) -> Any:
    """``x`` without its first ``shift`` entries along an axis, which follow at the end."""
    where = _ints(axis)
    rest = op.Slice(x, _ints(shift), _ints(_END), where)
    return op.Concat(rest, op.Slice(x, _ints(0), _ints(shift), where), axis=axis)


def padded_nodes(x: Any, rows: int, columns: int) -> Any:
    """Translation of ``padded``."""
    extra = [
        op.Sub(op.Mul(_steps(_length(x, axis), step), _ints(step)), _length(x, axis))
        for axis, step in ((2, rows), (3, columns))
    ]
    return op.Pad(x, op.Concat(_ints(0, 0, 0, 0, 0, 0), *extra, axis=0))


def windows_nodes(x: Any, size: int, shift: int) -> Any:
    """Translation of ``windows``."""
    rows, columns = (_steps(_length(x, axis), size) for axis in (1, 2))
    side = _ints(size)
    extra = [
        op.Sub(op.Mul(steps, side), _length(x, axis)) for axis, steps in ((1, rows), (2, columns))
    ]
    x = op.Pad(x, op.Concat(_ints(0, 0, 0, 0, 0), *extra, _ints(0), axis=0))
    if shift:
        x = _rolled(_rolled(x, shift, 1), shift, 2)
    channels = _length(x, 3)
    shape = op.Concat(_ints(-1), rows, side, columns, side, channels, axis=0)
    x = op.Transpose(op.Reshape(x, shape), perm=[0, 1, 3, 2, 4, 5])
    return op.Reshape(x, op.Concat(_ints(-1, size * size), channels, axis=0))


def merged_nodes(windowed: Any, like: Any, size: int, shift: int) -> Any:
    """Translation of ``merged``."""
    rows, columns = (_steps(_length(like, axis), size) for axis in (1, 2))
    side, channels = _ints(size), _length(like, 3)
    shape = op.Concat(_ints(-1), rows, columns, side, side, channels, axis=0)
    x = op.Transpose(op.Reshape(windowed, shape), perm=[0, 1, 3, 2, 4, 5])
    whole = (op.Mul(rows, side), op.Mul(columns, side))
    x = op.Reshape(x, op.Concat(_ints(-1), *whole, channels, axis=0))
    if shift:
        x = _rolled(_rolled(x, -shift, 1), -shift, 2)
    return op.Slice(x, _ints(0, 0), op.Shape(like, start=1, end=3), _ints(1, 2))


def window_mask_nodes(x: Any, size: int, shift: int) -> Any:
    """Translation of ``window_mask``."""
    rows, columns = (_steps(_length(x, axis), size) for axis in (1, 2))
    side = _ints(size)
    along = [_region_nodes(op.Mul(steps, side), size, shift) for steps in (rows, columns)]
    regions = op.Add(op.Mul(op.Unsqueeze(along[0], _ints(1)), _ints(3)), along[1])
    regions = op.Reshape(regions, op.Concat(rows, side, columns, side, axis=0))
    regions = op.Transpose(regions, perm=[0, 2, 1, 3])
    regions = op.Reshape(regions, _ints(-1, size * size))
    same = op.Equal(op.Unsqueeze(regions, _ints(1)), op.Unsqueeze(regions, _ints(2)))
    return op.Where(same, op.Constant(value_float=0.0), op.Constant(value_float=MASKED))


def _region_nodes(length: Any, size: int, shift: int) -> Any:
    """``_regions`` of a length in the graph, ``(1,)``; int64."""
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    index = op.Range(zero, op.Squeeze(length), one)
    in_last = (op.GreaterOrEqual(index, op.Sub(length, _ints(n))) for n in (size, shift))
    return op.Add(*(op.Cast(x, to=7) for x in in_last))


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.gplq_mm.padded.default: padded_nodes,
    torch.ops.gplq_mm.windows.default: windows_nodes,
    torch.ops.gplq_mm.merged.default: merged_nodes,
    torch.ops.gplq_mm.window_mask.default: window_mask_nodes,
}
"""Custom op -> function that writes its nodes."""
