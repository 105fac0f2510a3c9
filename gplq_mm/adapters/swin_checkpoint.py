# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Weights of detectors trained with Swin's own code for mmdet's `SwinTransformer`.

The source is `Swin-Transformer-Object-Detection` (Liu et al., arXiv 2103.14030), whose Cascade Mask
R-CNNs are what post-training papers start from. Neck and heads have mmdet's names already. In the
backbone the names differ, and the order in which a patch merging layer stacks four neighbours.
"""

from collections.abc import Mapping

from torch import Tensor

from ..utils.state_dict import check_state_dict, rename

BACKBONE_RENAMES = (
    (r'^backbone\.patch_embed\.proj\.', 'backbone.patch_embed.projection.'),
    (r'^backbone\.layers\.(\d+\.blocks\.\d+)\.attn\.', r'backbone.stages.\1.attn.w_msa.'),
    (r'^backbone\.layers\.(\d+\.blocks\.\d+)\.mlp\.fc1\.', r'backbone.stages.\1.ffn.layers.0.0.'),
    (r'^backbone\.layers\.(\d+\.blocks\.\d+)\.mlp\.fc2\.', r'backbone.stages.\1.ffn.layers.1.'),
    (r'^backbone\.layers\.', 'backbone.stages.'),
)


def rename_key(key: str) -> str:
    """Translate one name; those of the neck and the heads stay.

    Args:
        key: Name in the source's state dict.

    Returns:
        Name in the target's state dict.

    Example:
        >>> rename_key('backbone.layers.2.blocks.5.attn.qkv.weight')
        'backbone.stages.2.blocks.5.attn.w_msa.qkv.weight'
    """
    return rename(key, BACKBONE_RENAMES)


def reorder_neighbours(value: Tensor) -> Tensor:
    """Go from Swin's order of the 2 x 2 neighbours to the one of mmdet's ``nn.Unfold``.

    Swin concatenates whole pixels, column by column; ``nn.Unfold`` keeps each channel's four
    values together, row by row.

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


def convert_swin_state_dict(
    source: Mapping[str, Tensor], target: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Rename and reorder a Swin detector's state dict until it is the target's.

    Args:
        source: State dict of a detector of Swin's own code.
        target: State dict of mmdet's detector; only names and shapes are read.

    Returns:
        A state dict with the target's names, shapes and order.

    Raises:
        ValueError: If any name is left over, missing or of another shape; the first 12 of each
            kind are named.
    """
    weights = {
        rename_key(key): reorder_neighbours(value) if '.downsample.' in key else value
        for key, value in source.items()
    }
    check_state_dict(weights, target)
    return {key: weights[key].contiguous() for key in target}
