# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""timm: ViT, DeiT, EVA and BEiT attention, Swin and Swin V2 windows, feed-forward networks."""

from . import attention, heads, window

__all__ = ['attention', 'heads', 'window']
