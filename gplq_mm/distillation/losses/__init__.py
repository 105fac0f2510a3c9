# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Losses of stage 1; they require only torch."""

from .pca_mimic import PCAMimicLoss
from .relative_feature import RelativeFeatureLoss
from .soft_logits import SoftLogitLoss

__all__ = ['PCAMimicLoss', 'RelativeFeatureLoss', 'SoftLogitLoss']
