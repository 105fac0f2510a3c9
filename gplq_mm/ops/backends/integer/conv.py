# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Convolutions on integers: the input is quantized once, its windows are rows of a product."""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from ....compat.torch import padding_of_input
from ...dispatch import register_backend
from .. import exact
from . import kernels
from .layer_weight import SHAPES_DO_NOT_FIT, accepted_weight, layer_weight, refusal_of_call


def refusal(layer: Any, x: Tensor, bias: Tensor | None) -> str:
    """Why a call is refused; empty if it is computed here."""
    reason = refusal_of_call(layer, x, bias) or _refusal_of_shape(layer, x, bias)
    if reason:
        return reason
    weight = layer_weight(layer, arrange)
    return weight if isinstance(weight, str) else ''


def _refusal_of_shape(layer: Any, x: Tensor, bias: Tensor | None) -> str:
    if layer.groups != 1:
        return 'groups of channels'
    if isinstance(layer, nn.ConvTranspose2d):
        outside = set(layer.output_padding) != {0} or layer._output_size is not None
        if outside or not layer.is_matrix_product:
            return 'kernels that overlap in the output, or padding of the output'
    elif not isinstance(layer, nn.Conv2d) or layer.padding_mode != 'zeros':
        return 'padding with other values than zeros'
    if x.dim() != 4 or not x.numel():
        return 'an input without batch axis, or empty'
    window = _window(layer, x, isinstance(layer, nn.ConvTranspose2d))
    is_empty = min(window.out_height, window.out_width) < 1
    of_other_size = bias is not None and bias.shape != (layer.out_channels,)
    if x.shape[1] != layer.in_channels or is_empty or of_other_size:
        return SHAPES_DO_NOT_FIT
    return ''


def arrange(layer: Any, codes: Tensor, zero: Tensor) -> tuple[Tensor, Tensor, int]:
    """Codes per output channel, elements of the kernel in order (row, column, channel).

    A transposed convolution has one column per output channel and element of the kernel.
    """
    if isinstance(layer, nn.ConvTranspose2d):
        rows = codes.permute(1, 2, 3, 0).flatten(0, 2)
        return rows, zero.expand(rows.shape[1]), codes[0, 0].numel()
    rows = codes.permute(0, 2, 3, 1)
    return rows.flatten(1), zero.expand(rows.shape[1:]).flatten(), 1


def conv(layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """``layer.reference(x, bias)``, equal to ``exact.linear`` bit for bit.

    Args:
        layer: Convolution whose quantizers are active.
        x: ``(B, C, H, W)``.
        bias: ``(out,)``, or None.

    Returns:
        ``(B, out, H', W')``.
    """
    weight = accepted_weight(layer, arrange)
    x, matrix, kernel = x.contiguous(), weight.matrix, layer.kernel_size
    transposed = isinstance(layer, nn.ConvTranspose2d)
    window = _window(layer, x, transposed)
    size = window.out_height, window.out_width
    out = x.new_empty(len(x), matrix.columns, *size)
    of_columns = bias
    if bias is not None:
        of_columns = bias.repeat_interleave(matrix.columns // len(bias)).contiguous()
    arguments = kernels.product(matrix, size[0] * size[1], weight.factor, of_columns, out)
    arguments.row_step, arguments.column_step = 1, size[0] * size[1]
    kind = torch.int16 if matrix.layout.wide else torch.uint8
    pixel = (weight.zero - weight.grid.qmin).expand(x.shape[1]).to(kind).contiguous()
    pixels = len(x) * window.padded_height * window.padded_width
    status = kernels.loaded().conv(
        ctypes.byref(weight.grid),
        ctypes.byref(window),
        ctypes.byref(arguments),
        *(kernels.Pointer(t.data_ptr()) for t in (x, pixel)),
        kernels.workspace(pixels * x.shape[1] * kind.itemsize),
        kernels.threads_for(out.numel() * matrix.layout.groups * 4),
    )
    if not kernels.completed(status):
        return exact.linear(layer, x, bias)
    if not transposed:
        return out
    parts = out.view(len(x), -1, *kernel, *size).permute(0, 1, 4, 2, 5, 3)
    return parts.reshape(len(x), -1, size[0] * kernel[0], size[1] * kernel[1])


def _window(layer: Any, x: Tensor, transposed: bool) -> kernels.CWindow:
    """Geometry of the windows; a transposed convolution reads single pixels."""
    batch, channels, height, width = x.shape
    if transposed:
        own = (1, 1, 1, 1, 1, 1, 0, 0, height, width, height, width)
        return kernels.CWindow(batch, channels, height, width, *own)
    left, right, top, bottom = padding_of_input(layer)
    padded = height + top + bottom, width + left + right
    sizes = zip(padded, layer.kernel_size, layer.stride, layer.dilation, strict=True)
    out = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in sizes]
    steps = (*layer.kernel_size, *layer.stride, *layer.dilation, top, left)
    return kernels.CWindow(batch, channels, height, width, *steps, *padded, *out)


register_backend('integer', 'integer', ['conv'], refusal, conv)
