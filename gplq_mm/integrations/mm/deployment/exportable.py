# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The part of an MM model that is exported, as a module from images to tensors."""

from typing import Any

from torch import Tensor, nn

from ..model_structure import describe


class ExportedClassifier(nn.Module):
    """A classifier from normalized images to logits, ``(B, 3, H, W)`` -> ``(B, classes)``.

    The data preprocessor and the head's loss are not part of it.

    Args:
        model: ``mmpretrain`` classifier.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.model(images, mode='tensor')


class ExportedBackbone(nn.Module):
    """Backbone and neck of a detector, ``(B, 3, H, W)`` -> a tuple of feature maps.

    Args:
        model: ``mmdet`` detector.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.neck = model.neck if getattr(model, 'neck', None) is not None else nn.Identity()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Feature maps, from the largest to the smallest."""
        maps = self.neck(self.backbone(images))
        return (maps,) if isinstance(maps, Tensor) else tuple(maps)


def exportable(model: Any) -> nn.Module:
    """The whole model of a classifier, backbone and neck of a detector; in evaluation mode.

    Args:
        model: Built by MMEngine; its modules are shared.

    Returns:
        Module that is called with a tensor of normalized images.
    """
    part = ExportedBackbone(model) if describe(model).is_detector else ExportedClassifier(model)
    return part.eval()
