# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Convert timm's ViT, DeiT (distilled, III) and Swin weights to mmpretrain's classifiers.

The networks are the same, with q, k and v in the same order. The names differ (those of heads
depend on the target), and in Swin the order of the four neighbours in a patch merging layer. The
layout of Swin's and DeiT's public files is supported too: a merging layer belongs to the stage
before it, constant buffers are stored, and everything is inside ``{'model': ...}``.

DeiT III is converted to ``VisionTransformer`` with LayerScale; its class token gets a position
embedding of zero. mmpretrain 1.2.0 has a class ``DeiT3``, but its blocks normalise the FFN's input
by ``ln1`` and never use ``ln2``: with the published weights it is another network.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .patch_merging import reorder_neighbours
from .state_dict import check_state_dict, rename

RENAMES = (
    (r'^(cls_token|dist_token|pos_embed)$', r'backbone.\1'),
    (r'^patch_embed\.proj\.', 'backbone.patch_embed.projection.'),
    (r'^patch_embed\.norm\.', 'backbone.patch_embed.norm.'),
    (r'^blocks\.(\d+)\.norm([12])\.', r'backbone.layers.\1.ln\2.'),
    (r'^blocks\.(\d+)\.mlp\.fc1\.', r'backbone.layers.\1.ffn.layers.0.0.'),
    (r'^blocks\.(\d+)\.mlp\.fc2\.', r'backbone.layers.\1.ffn.layers.1.'),
    (r'^blocks\.(\d+)\.(ls1\.gamma|gamma_1)$', r'backbone.layers.\1.attn.gamma1.weight'),
    (r'^blocks\.(\d+)\.(ls2\.gamma|gamma_2)$', r'backbone.layers.\1.ffn.gamma2.weight'),
    (r'^blocks\.(\d+)\.attn\.(qkv|proj)\.', r'backbone.layers.\1.attn.\2.'),
    (r'^layers\.(\d+\.blocks\.\d+)\.norm([12])\.', r'backbone.stages.\1.norm\2.'),
    (r'^layers\.(\d+\.blocks\.\d+)\.attn\.', r'backbone.stages.\1.attn.w_msa.'),
    (r'^layers\.(\d+\.blocks\.\d+)\.mlp\.fc1\.', r'backbone.stages.\1.ffn.layers.0.0.'),
    (r'^layers\.(\d+\.blocks\.\d+)\.mlp\.fc2\.', r'backbone.stages.\1.ffn.layers.1.'),
    (r'^layers\.(\d+)\.downsample\.', r'backbone.stages.\1.downsample.'),
    (r'^fc_norm\.', 'backbone.ln2.'),
    (r'^pre_logits\.fc\.', 'head.layers.pre_logits.'),
)
_CONSTANT = re.compile(r'\.(relative_position_index|attn_mask)$')
_POSITIONS = 'backbone.pos_embed'
_MERGING = re.compile(r'^layers\.(\d+)\.downsample\.')


def rename_key(key: str) -> str:
    """Translate one name; unknown names and those that depend on the target do not change.

    Args:
        key: Name in timm's state dict.

    Returns:
        Name in mmpretrain's state dict.

    Example:
        >>> rename_key('blocks.3.mlp.fc1.weight')
        'backbone.layers.3.ffn.layers.0.0.weight'
    """
    return rename(key, RENAMES)


def convert_timm_state_dict(
    source: Mapping[str, Tensor], target: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Rename and reorder a timm state dict to match the target's.

    Args:
        source: State dict of a timm model, or ``{'model': ...}`` around one.
        target: State dict of mmpretrain's float classifier. Names and shapes are read, and
            Swin's constant position index is copied.

    Returns:
        A state dict with the target's names, shapes and order.

    Raises:
        ValueError: If any name is unexpected, missing or of another shape, or a constant buffer of
            the source differs from the target's; the message has the first 12 of each kind.
    """
    source = _unwrap(source)
    shift = 0 if any(key.startswith('layers.0.downsample.') for key in source) else -1
    by_target = _names_by_target(target)
    weights: dict[str, Tensor] = {}
    for key, value in source.items():
        if _CONSTANT.search(key):
            _check_constant(key, value, target)
            continue
        if _MERGING.search(key):
            value = reorder_neighbours(value)
            key = _MERGING.sub(lambda m: f'layers.{int(m[1]) + shift}.downsample.', key)
        weights[rename(key, (*RENAMES, *by_target))] = value
    if 'pos_embed' in source:
        weights[_POSITIONS] = _with_class_position(weights[_POSITIONS], target.get(_POSITIONS))
    constant = {key: value for key, value in target.items() if _CONSTANT.search(key)}
    check_state_dict({**weights, **constant}, target)
    return {key: {**weights, **constant}[key].contiguous() for key in target}


def _unwrap(source: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The state dict inside Swin's and DeiT's public files."""
    for name in ('model_ema', 'model'):
        if isinstance(source.get(name), Mapping):
            return source[name]  # type: ignore[return-value]
    return source


def _names_by_target(target: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Renaming rules for the last norm and the head, whose names depend on the model class."""
    norm = next((k for k in target if re.match(r'backbone\.(norm\d|ln1)\.', k)), 'backbone.ln1.x')
    head = 'head.layers.head' if 'head.layers.head.weight' in target else 'head.fc'
    return [
        (r'^norm\.', f'{norm.rpartition(".")[0]}.'),
        (r'^head\.(fc\.)?(weight|bias)$', rf'{head}.\2'),
        (r'^head_dist\.', 'head.layers.head_dist.'),
    ]


def _with_class_position(found: Tensor, like: Tensor | None) -> Tensor:
    """``(1, N, C)`` -> ``(1, 1 + N, C)`` if the target's class token has a position embedding."""
    if like is None or like.shape[1] != found.shape[1] + 1:
        return found
    return torch.cat((torch.zeros_like(found[:, :1]), found), dim=1)


def _check_constant(key: str, value: Tensor, target: Mapping[str, Tensor]) -> None:
    """Refuse a position index unlike the target's; attention masks depend on the image only."""
    own = target.get(rename_key(key))
    if own is not None and not (own.shape == value.shape and torch.equal(own, value.to(own.dtype))):
        raise ValueError(
            f'the checkpoint does not fit the target model\n  {key} {tuple(value.shape)} is not '
            f"the target's {tuple(own.shape)}: another window size"
        )
