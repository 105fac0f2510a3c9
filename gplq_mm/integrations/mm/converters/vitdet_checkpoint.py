# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Convert mmdet's `projects/ViTDet` to a detector with the backbone `mmpretrain.ViTSAM`.

Both are the same network. Only the backbone's names and the position embedding differ: the source
stores it at the pretraining resolution with a class token in front, ViTSAM at the detector's
resolution.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from .state_dict import check_state_dict, rename

BACKBONE_RENAMES = (
    (r'^backbone\.patch_embed\.proj\.', 'backbone.patch_embed.projection.'),
    (r'^backbone\.blocks\.(\d+)\.norm([12])\.', r'backbone.layers.\1.ln\2.'),
    (r'^backbone\.blocks\.(\d+)\.mlp\.fc1\.', r'backbone.layers.\1.ffn.layers.0.0.'),
    (r'^backbone\.blocks\.(\d+)\.mlp\.fc2\.', r'backbone.layers.\1.ffn.layers.1.'),
    (r'^backbone\.blocks\.(\d+)\.', r'backbone.layers.\1.'),
)


def rename_key(key: str) -> str:
    """Translate one name; names of neck and heads do not change.

    Args:
        key: Name in the source's state dict.

    Returns:
        Name in the target's state dict.

    Example:
        >>> rename_key('backbone.blocks.3.mlp.fc1.weight')
        'backbone.layers.3.ffn.layers.0.0.weight'
    """
    return rename(key, BACKBONE_RENAMES)


def resize_position_embedding(pos_embed: Tensor, size: tuple[int, int]) -> Tensor:
    """Drop the class token and interpolate, as the source does in each forward pass.

    Args:
        pos_embed: ``(1, S * S, C)``, or ``(1, 1 + S * S, C)`` with a class token in front.
        size: Height and width of the target's grid, in patches.

    Returns:
        Position embedding ``(1, H, W, C)``.

    Raises:
        ValueError: If the embedding is no square grid.

    Example:
        >>> import torch
        >>> resize_position_embedding(torch.zeros(1, 1 + 14 * 14, 8), (64, 64)).shape
        torch.Size([1, 64, 64, 8])
    """
    side = int(pos_embed.shape[1] ** 0.5)
    extra = pos_embed.shape[1] - side * side
    if pos_embed.dim() != 3 or extra not in (0, 1):
        raise ValueError(
            f'pos_embed must be (1, S * S, C) or (1, 1 + S * S, C), got {tuple(pos_embed.shape)}'
        )
    grid = pos_embed[:, extra:].unflatten(1, (side, side))  # (1, S, S, C)
    if (side, side) == tuple(size):
        return grid.clone()
    grid = F.interpolate(
        grid.permute(0, 3, 1, 2).float(), size=size, mode='bicubic', align_corners=False
    )
    return grid.permute(0, 2, 3, 1).to(pos_embed.dtype).contiguous()


def resize_relative_positions(table: Tensor, length: int) -> Tensor:
    """Interpolate a table of relative positions, as both networks do when sizes differ.

    Args:
        table: ``(2 * S - 1, head_dim)``: one vector per distance along one axis.
        length: Number of distances required.

    Returns:
        Table ``(length, head_dim)``.

    Example:
        >>> import torch
        >>> resize_relative_positions(torch.zeros(27, 64), 13).shape
        torch.Size([13, 64])
    """
    if table.shape[0] == length:
        return table
    return F.interpolate(table.t()[None], size=length, mode='linear')[0].t().contiguous()


def convert_vitdet_state_dict(
    source: Mapping[str, Tensor], target: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Rename and reshape a ViTDet state dict to match the target's.

    Args:
        source: State dict of mmdet's ViTDet Mask R-CNN.
        target: State dict of the float target; only names and shapes are read, so a model on the
            ``meta`` device is enough.

    Returns:
        A state dict with the target's names, shapes and order.

    Raises:
        ValueError: If any name is unexpected, missing or of another shape; the message has the
            first 12 of each kind.
    """
    renamed = {rename_key(key): value for key, value in source.items()}
    fitted = {
        key: _fit(key, value, target[key]) if key in target else value
        for key, value in renamed.items()
    }
    check_state_dict(fitted, target)
    return {key: fitted[key] for key in target}


def _fit(key: str, value: Tensor, like: Tensor) -> Tensor:
    """Resize both kinds of position table to the target's resolution."""
    if key.endswith('.pos_embed') and value.dim() == 3 and like.dim() == 4:
        return resize_position_embedding(value, (like.shape[1], like.shape[2]))
    if key.endswith(('.rel_pos_h', '.rel_pos_w')):
        return resize_relative_positions(value, like.shape[0])
    return value
