# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Transformer blocks of a model, found by structure and not by class."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from ..ops import QuantizedLayer

_ATTENTION_NAMES = ('attn', 'attention', 'self_attn')
_FFN_NAMES = ('ffn', 'mlp')


def is_block(module: nn.Module) -> bool:
    """Whether a module has both an attention and a feed-forward child.

    True for the blocks of mmpretrain's ViT, DeiT III, BEiT, ViTSAM, Swin and Swin V2,
    mmdet's Swin and the ViTDet project, whose first input and output are tokens
    ``(B, ..., C)``. False for a decoder layer (``cross_attn``).
    """
    children = {name for name, child in module.named_children() if child is not None}
    return (
        any(name in children for name in _ATTENTION_NAMES)
        and any(name in children for name in _FFN_NAMES)
        and 'cross_attn' not in children
    )


def block_width(block: nn.Module) -> int:
    """Channels C of a block's tokens: the size of its first normalization.

    Raises:
        ValueError: If no child determines the width.
    """
    for child in block.children():
        shape = getattr(child, 'normalized_shape', None)
        if shape is not None:
            return int(shape[-1])
    for child in (block, *block.children()):
        width = getattr(child, 'embed_dims', None)
        if isinstance(width, int):
            return width
    raise ValueError(
        f'{type(block).__name__}: the width of its tokens is unknown, it has no LayerNorm child '
        'and no embed_dims; leave it out of compensation.blocks'
    )


def find_blocks(model: nn.Module, blocks: str | Sequence[str] = 'auto') -> dict[str, nn.Module]:
    """Transformer blocks with a quantized layer, by name, in model order.

    Args:
        model: Converted model.
        blocks: ``auto`` for all of them, or shell patterns of block names.

    Raises:
        ValueError: If there is no such block, or if a pattern matches none.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if is_block(module) and any(isinstance(m, QuantizedLayer) for m in module.modules())
    }
    if not found:
        raise ValueError(
            f'{type(model).__name__} has no quantized transformer block (a module with an '
            'attention and an ffn child); write stage2=dict(compensation=None)'
        )
    if blocks == 'auto':
        return found
    patterns = [blocks] if isinstance(blocks, str) else list(blocks)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in found):
            raise ValueError(
                f'compensation.blocks: {pattern!r} matches none of the blocks {sorted(found)}'
            )
    return {n: m for n, m in found.items() if any(fnmatchcase(n, p) for p in patterns)}
