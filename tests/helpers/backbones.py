# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Backbones of mmpretrain with attention of their own, small enough for a second on one core."""

from typing import Any

from torch import nn

from tests.helpers.mm_models import build

_TWINS = dict(
    embed_dims=[8, 16],
    depths=[1, 2],
    num_heads=[1, 2],
    patch_sizes=[4, 2],
    strides=[4, 2],
    mlp_ratios=[2, 2],
    sr_ratios=[2, 1],
)

BACKBONES: dict[str, tuple[dict[str, Any], int]] = {
    'twins_pcpvt': (dict(type='PCPVT', arch=_TWINS, out_indices=(1,)), 32),
    'twins_svt': (dict(type='SVT', arch={**_TWINS, 'window_sizes': [3, 2]}, out_indices=(1,)), 32),
}
"""Name -> config, image size."""


def backbone(name: str) -> nn.Module:
    """The backbone alone."""
    return build(BACKBONES[name][0], 'mmpretrain')
