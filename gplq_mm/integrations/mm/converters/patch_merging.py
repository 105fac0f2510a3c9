# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The two orders of the four neighbours in patch merging: Swin's own and OpenMMLab's."""

from torch import Tensor


def reorder_neighbours(value: Tensor) -> Tensor:
    """Reorder the 2 x 2 neighbours from Swin's order (timm's too) to that of ``nn.Unfold``.

    Swin concatenates the channels of whole pixels, column by column; ``nn.Unfold``, which mmdet and
    mmpretrain use, concatenates the four values of each channel, row by row.

    Args:
        value: Weight ``(C_out, 4 * C)`` of the reduction, or a vector ``(4 * C,)`` of its norm.

    Returns:
        The same shape, reordered along the last axis.

    Example:
        >>> import torch
        >>> reorder_neighbours(torch.arange(8)).tolist()
        [0, 4, 2, 6, 1, 5, 3, 7]
    """
    pixels = value.unflatten(-1, (2, 2, -1))  # (..., column, row, C)
    return pixels.movedim(-1, -3).transpose(-1, -2).flatten(-3)  # (..., C, row, column)
