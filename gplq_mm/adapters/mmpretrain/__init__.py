# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""mmpretrain: one file a family of classes."""

from . import attention, bias_attention, heads, twins, vit_sam, window

__all__ = ['attention', 'bias_attention', 'heads', 'twins', 'vit_sam', 'window']
