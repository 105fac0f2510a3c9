# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Convert detectors trained with Swin's own code to mmdet's `SwinTransformer`.

The source is `Swin-Transformer-Object-Detection` (Liu et al., arXiv 2103.14030), whose Cascade Mask
R-CNNs are the usual FP32 models of post-training papers. Neck and heads have mmdet's names. The
backbone differs in its names and in the order of the four neighbours in a patch merging layer.
"""

from collections.abc import Mapping

from torch import Tensor

from .patch_merging import reorder_neighbours
from .state_dict import check_state_dict, rename

BACKBONE_RENAMES = (
    (r'^backbone\.patch_embed\.proj\.', 'backbone.patch_embed.projection.'),
    (r'^backbone\.layers\.(\d+\.blocks\.\d+)\.attn\.', r'backbone.stages.\1.attn.w_msa.'),
    (r'^backbone\.layers\.(\d+\.blocks\.\d+)\.mlp\.fc1\.', r'backbone.stages.\1.ffn.layers.0.0.'),
    (r'^backbone\.layers\.(\d+\.blocks\.\d+)\.mlp\.fc2\.', r'backbone.stages.\1.ffn.layers.1.'),
    (r'^backbone\.layers\.', 'backbone.stages.'),
)


def rename_key(key: str) -> str:
    """Translate one name; names of neck and heads do not change.

    Args:
        key: Name in the source's state dict.

    Returns:
        Name in the target's state dict.

    Example:
        >>> rename_key('backbone.layers.2.blocks.5.attn.qkv.weight')
        'backbone.stages.2.blocks.5.attn.w_msa.qkv.weight'
    """
    return rename(key, BACKBONE_RENAMES)


def convert_swin_state_dict(
    source: Mapping[str, Tensor], target: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Rename and reorder a Swin detector's state dict to match the target's.

    Args:
        source: State dict of a detector trained with Swin's own code.
        target: State dict of mmdet's detector; only names and shapes are read.

    Returns:
        A state dict with the target's names, shapes and order.

    Raises:
        ValueError: If any name is unexpected, missing or of another shape; the message has the
            first 12 of each kind.
    """
    weights = {
        rename_key(key): reorder_neighbours(value) if '.downsample.' in key else value
        for key, value in source.items()
    }
    check_state_dict(weights, target)
    return {key: weights[key].contiguous() for key in target}
