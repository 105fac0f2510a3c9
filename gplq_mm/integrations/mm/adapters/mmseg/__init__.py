# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""mmsegmentation: attention of its backbones, attention and roles of its decode heads."""

from . import backbones, decode_heads, self_attention

__all__ = ['backbones', 'decode_heads', 'self_attention']
