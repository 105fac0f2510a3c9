# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The part of an MM model that is exported, as a module from images to tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ....convert.model_facts import facts_of


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
        """``(B, 3, H, W)`` -> logits ``(B, classes)``."""
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
        """``(B, 3, H, W)`` -> feature maps ``(B, C, h, w)``, from the largest to the smallest."""
        maps = self.neck(self.backbone(images))
        return (maps,) if isinstance(maps, Tensor) else tuple(maps)


def exportable(model: Any) -> nn.Module:
    """The whole model of a classifier, backbone and neck of a detector; in evaluation mode.

    Args:
        model: Built by MMEngine; its modules are shared.

    Returns:
        Module that is called with a tensor of normalized images.
    """
    part = ExportedBackbone(model) if facts_of(model).is_detector else ExportedClassifier(model)
    return part.eval()


@contextmanager
def integer_batch(model: nn.Module) -> Iterator[None]:
    """Within this context Swin's windows are put together for any number of images.

    mmdet and mmpretrain compute the number of images as ``int(windows / (H * W / size ** 2))``,
    which an export turns into the example's number: the file then mixes images of other batches.

    Args:
        model: Its modules with a ``window_reverse`` get another one for the time.
    """
    owners = [m for m in model.modules() if callable(getattr(m, 'window_reverse', None))]
    for owner in owners:
        owner.window_reverse = _WindowReverse(owner)  # type: ignore[assignment]
    try:
        yield
    finally:
        for owner in owners:
            del owner.window_reverse


class _WindowReverse:
    """``window_reverse`` of a Swin attention, in integers; called with or without the size."""

    def __init__(self, owner: Any) -> None:
        self.size = owner.window_size

    def __call__(self, windows: Tensor, H: int, W: int, window_size: int | None = None) -> Tensor:
        size = window_size or self.size
        rows, columns = H // size, W // size
        x = windows.reshape(-1, rows, columns, size, size, windows.shape[-1])
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, H, W, windows.shape[-1])
