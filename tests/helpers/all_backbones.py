# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The tiny backbones of mmpretrain and mmseg, and how to build one by its name."""

from torch import nn

from tests.helpers import backbones, segmentors

BACKBONES = {**backbones.BACKBONES, **segmentors.BACKBONES}


def backbone(name: str) -> nn.Module:
    """A backbone of either library."""
    return (segmentors if name in segmentors.BACKBONES else backbones).backbone(name)
