# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Floor 2: losses of stage 1; they need torch only."""

from .distillation import SoftLogitLoss
from .feature import RelativeFeatureLoss
from .pca import PCAMimicLoss

__all__ = ['PCAMimicLoss', 'RelativeFeatureLoss', 'SoftLogitLoss']
