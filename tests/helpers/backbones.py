# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Backbones of mmpretrain with attention of their own, small enough for a second on one core."""

from typing import Any

import torch
from torch import nn

from tests.helpers.mm_models import build

TWINS = dict(
    embed_dims=[8, 16],
    depths=[1, 2],
    num_heads=[1, 2],
    patch_sizes=[4, 2],
    strides=[4, 2],
    mlp_ratios=[2, 2],
    sr_ratios=[2, 1],
)
_SWIN = dict(embed_dims=8, depths=[1, 1], num_heads=[2, 4])

BACKBONES: dict[str, tuple[dict[str, Any], int]] = {
    'twins_pcpvt': (dict(type='PCPVT', arch=TWINS, out_indices=(1,)), 32),
    'twins_svt': (dict(type='SVT', arch={**TWINS, 'window_sizes': [3, 2]}, out_indices=(1,)), 32),
    'davit': (
        dict(type='DaViT', arch=_SWIN, patch_size=4, window_size=4, ffn_ratio=2, out_indices=(1,)),
        32,
    ),
    'mixmim': (
        dict(type='MixMIMTransformer', arch=_SWIN, mlp_ratio=2, img_size=32, window_size=[4, 4]),
        32,
    ),
    'xcit': (
        dict(
            type='XCiT',
            img_size=32,
            patch_size=8,
            embed_dims=16,
            depth=2,
            num_heads=2,
            mlp_ratio=2,
            cls_attn_layers=1,
        ),
        32,
    ),
    'edgenext': (
        dict(
            type='EdgeNeXt',
            arch=dict(channels=[8, 8, 16, 16], depths=[1, 1, 1, 2], num_heads=[2, 2, 2, 4]),
            mlp_ratio=2,
            d2_scales=[2, 2, 2, 4],
        ),
        64,
    ),
    'mvit': (
        dict(
            type='MViT',
            arch=dict(embed_dims=8, num_layers=3, num_heads=1, downscale_indices=[1]),
            img_size=32,
            mlp_ratio=2.0,
        ),
        32,
    ),
}
"""Name -> config, image size."""


def backbone(name: str) -> nn.Module:
    """The backbone alone, no branch scaled down to nothing."""
    model = build(BACKBONES[name][0], 'mmpretrain')
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if 'gamma' in key:
                parameter.uniform_(0.5, 1.5)
    return model
