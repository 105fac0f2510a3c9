# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""mmpretrain: one file per family of attention classes."""

from . import (
    attention,
    bias_attention,
    davit,
    edgenext,
    heads,
    mixmim,
    mvit,
    twins,
    vit_sam,
    window,
    xcit,
)

__all__ = [
    'attention',
    'bias_attention',
    'davit',
    'edgenext',
    'heads',
    'mixmim',
    'mvit',
    'twins',
    'vit_sam',
    'window',
    'xcit',
]
