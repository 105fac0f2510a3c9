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

import torch
from torch import Tensor

from . import cpu_kernels, packed_passes
from .grid import Grid

RESIDUAL_ERROR = 1 / (2 * packed_passes.FIELD_LEVELS)
"""Largest error of a stored rounding residual, in steps of the grid."""


def quantize_packed(x: Tensor, scale: Tensor, grid: Grid) -> tuple[Tensor, list[Tensor]]:
    """Values of ``x`` on the grid, and the bytes that stand for them in the backward pass.

    Args:
        x: Real values in float32.
        scale: Positive step size, broadcastable to ``x``.
        grid: Codes allowed.

    Returns:
        ``(values, packed)``: values equal those of ``fake_quantize_ste`` bit for bit where
        ``x`` is finite and are NaN elsewhere, in the layout of ``x / scale``; packed is one
        int8 tensor of the same shape and layout, with a second, flat one of half the size
        for more than 4 bits.

    Examples:
        >>> grid = Grid(-8, 7, 0.0)
        >>> values, (packed,) = quantize_packed(torch.tensor([0.6, 9.0]), torch.tensor(0.5), grid)
        >>> values, (packed >> 4).tolist(), (packed & 15).tolist()  # residual 0.2: level 8 + 3
        (tensor([0.5000, 3.5000]), [1, 7], [11, 0])
    """
    if grid.levels is not None:
        raise ValueError('logarithmic codes are computed again, not packed')
    library = cpu_kernels.kernels_for(x, scale)
    passes = packed_passes if library is None else library
    values, codes, field = passes.pack(x, scale, grid)
    return values, [codes] if field is None else [codes, _in_pairs(field)]


def quantize_values(x: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Values of ``x`` on the grid, bit for bit those of ``fake_quantize_ste``, without a graph."""
    library = cpu_kernels.kernels_for(x, scale)
    return (packed_passes if library is None else library).quantize(x, scale, grid)


def unpack_values(packed: Sequence[Tensor], scale: Tensor, grid: Grid) -> Tensor:
    """The values that were packed, exactly, in float32."""
    library = cpu_kernels.kernels_for(packed[0], scale)
    return (packed_passes if library is None else library).unpack(packed[0], scale, grid)


def packed_backward(
    packed: Sequence[Tensor], grad: Tensor, scale: Tensor, grid: Grid, of_scale: bool
) -> tuple[Tensor, Tensor | None]:
    """LSQ's gradients of the input and the scale.

    Args:
        packed: What ``quantize_packed`` returned.
        grad: Gradient of the values; may be overwritten.
        scale: Step size.
        grid: Codes allowed.
        of_scale: Whether the scale's gradient is wanted.

    Returns:
        ``(grad_x, grad_scale)``. The first is exact. The second is off by at most
        ``RESIDUAL_ERROR * sum(|grad|)`` over the elements that share the scale.

    Source: LSQ (arXiv 1902.08153), equations 1 to 3.
    """
    codes = packed[0]
    field = None if grid.is_narrow else _from_pairs(packed[1], codes)
    grad = grad.float()
    if grad.stride() != codes.stride():
        grad = torch.empty_like(codes, dtype=grad.dtype).copy_(grad)
    library = cpu_kernels.kernels_for(grad, codes, scale)
    passes = packed_passes if library is None or not grad.numel() else library
    return passes.backward(codes, field, grad, scale, grid, of_scale)


def softmax_backward(
    probabilities: Tensor, grad: Tensor, scale: Tensor, grid: Grid, of_scale: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the logits and the scale of quantized probabilities; nothing was packed.

    Args:
        probabilities: ``softmax(logits)`` along the last axis, contiguous.
        grad: Gradient of their quantized values; may be overwritten.
        scale: Step size, broadcastable.
        grid: Codes allowed.
        of_scale: Whether the scale's gradient is wanted.

    Returns:
        ``(grad_logits, grad_scale)``, both exact.
    """
    grad = grad.float()
    library = cpu_kernels.kernels_for(probabilities, grad, scale)
    passes = packed_passes if library is None or not grad.numel() else library
    return passes.softmax_backward(probabilities, grad.contiguous(), scale, grid, of_scale)


def _in_pairs(field: Tensor) -> Tensor:
    """Two fields a byte, in the order of memory."""
    flat = packed_passes.flat(field)
    if len(flat) % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    pairs = flat.view(-1, 2)
    return pairs[:, 0] + pairs[:, 1] * 16


def _from_pairs(pairs: Tensor, codes: Tensor) -> Tensor:
    """Fields as bytes, in the layout of ``codes``."""
    field = torch.empty_like(codes)
    single = torch.stack([pairs & 15, (pairs >> 4) & 15], dim=1)
    packed_passes.flat(field).copy_(single.flatten()[: field.numel()])
    return field
