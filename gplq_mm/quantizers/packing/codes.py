# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Backward passes on the packed codes of ``fake_quantizer.quantize_packed``.

Packed codes store a quantized tensor as integers, with all that LSQ's backward pass needs.
An element of at most 4 bits takes one byte: its code in the upper half, in the lower
half a *field* with the rounding residual ``r - round(r)`` of ``r = x / scale`` in 15
levels (1 to 15), or 0 where ``r`` is outside LSQ's range (the code alone does not show
it). 5 to 8 bits take a byte for the code and half a byte for the field.

The backward pass gets the dequantized value and the range mask exactly, and each
element's contribution to the scale's gradient up to ``|gradient| * RESIDUAL_ERROR``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..fake_quantizer import Grid, passes_for
from . import torch_passes

RESIDUAL_ERROR = 1 / (2 * torch_passes.FIELD_LEVELS)
"""Largest error of a stored rounding residual, in steps of the grid."""


def unpack_values(packed: Sequence[Tensor], scale: Tensor, grid: Grid) -> Tensor:
    """The quantized values, exactly, in float32 and the shape of the codes."""
    return passes_for(packed[0], scale).unpack(packed[0], scale, grid)


def packed_backward(
    packed: Sequence[Tensor], grad: Tensor, scale: Tensor, grid: Grid, of_scale: bool
) -> tuple[Tensor, Tensor | None]:
    """LSQ's gradients of the input and the scale.

    Args:
        packed: Packed codes of ``quantize_packed``.
        grad: Gradient of the values; may be overwritten.
        scale: Step size.
        grid: Allowed codes.
        of_scale: Whether to compute the scale's gradient.

    Returns:
        ``(grad_x, grad_scale)``. The first is exact. The error of the second is at most
        ``RESIDUAL_ERROR * sum(|grad|)`` over the elements that share the scale.

    Source: LSQ (arXiv 1902.08153), equations 1 to 3.
    """
    codes = packed[0]
    field = None if grid.is_narrow else _from_pairs(packed[1], codes)
    grad = grad.float()
    if grad.stride() != codes.stride():
        grad = torch.empty_like(codes, dtype=grad.dtype).copy_(grad)
    passes = passes_for(grad, codes, scale) if grad.numel() else torch_passes
    return passes.backward(codes, field, grad, scale, grid, of_scale)


def softmax_backward(
    probabilities: Tensor, grad: Tensor, scale: Tensor, grid: Grid, of_scale: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the logits and of the scale of quantized probabilities, without packed codes.

    Args:
        probabilities: ``softmax(logits)`` along the last axis, contiguous.
        grad: Gradient of their quantized values; may be overwritten.
        scale: Step size, broadcastable.
        grid: Allowed codes.
        of_scale: Whether to compute the scale's gradient.

    Returns:
        ``(grad_logits, grad_scale)``, both exact.
    """
    grad = grad.float()
    passes = passes_for(probabilities, grad, scale) if grad.numel() else torch_passes
    return passes.softmax_backward(probabilities, grad.contiguous(), scale, grid, of_scale)


def _from_pairs(pairs: Tensor, codes: Tensor) -> Tensor:
    """Fields as bytes, in the layout of ``codes``."""
    field = torch.empty_like(codes)
    single = torch.stack([pairs & 15, (pairs >> 4) & 15], dim=1)
    torch_passes.flat(field).copy_(single.flatten()[: field.numel()])
    return field
