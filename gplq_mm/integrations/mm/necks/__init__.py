# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Necks of the shipped configs that the mmdet wheel does not have."""

from gplq_mm.compat.installed import is_installed

from .layer_norm_2d import LayerNorm2d

__all__ = ['LayerNorm2d']

if is_installed('mmcv'):
    from .simple_feature_pyramid import SimpleFeaturePyramid

    __all__ += ['SimpleFeaturePyramid']
