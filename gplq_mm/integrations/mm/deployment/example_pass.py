# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""One forward pass of an MM model on random images, without data sets."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from mmengine.structures import BaseDataElement

CLASSIFIER_SIZE, DETECTOR_SIZE = 224, 256
"""Sides of images of models whose config names none."""


def image_size(model: Any, given: Sequence[int] | None = None) -> tuple[int, int]:
    """Height and width of images that a model takes.

    Args:
        model: Model of ``gplq_mm.GPLQ``.
        given: One or two numbers; None for the ``img_size`` of the backbone (of the model in a
            ``TimmClassifier``), 224 for a classifier without one, the window of a segmentor that
            slides one over the image, 256 for other detectors and segmentors.

    Raises:
        ValueError: If ``given`` is no size.
    """
    if given is not None:
        size = (*given, *given)[:2] if len(given) == 1 else tuple(given)
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f'an image has a height and a width, got {list(given)}')
        return size[0], size[1]
    float_cfg: Mapping[str, Any] = getattr(model.gplq, 'float_cfg', {})  # none without MMEngine
    if model.gplq.is_detector:
        test_cfg: Mapping[str, Any] = float_cfg.get('test_cfg') or {}
        window = test_cfg.get('crop_size', (DETECTOR_SIZE, DETECTOR_SIZE))
        return window[0], window[1]
    backbone: Mapping[str, Any] = float_cfg.get('backbone') or {}
    owner = model.backbone if hasattr(model, 'backbone') else model.model.patch_embed
    found = backbone.get('img_size', getattr(owner, 'img_size', CLASSIFIER_SIZE))
    return (found, found) if isinstance(found, int) else (found[0], found[1])


def example_pass(model: Any, size: Sequence[int] | None = None) -> Callable[[], Any]:
    """A function that runs all parts of a model, heads included, on one random image.

    Args:
        model: Model of ``gplq_mm.GPLQ``.
        size: See ``image_size``.

    Raises:
        ValueError: If ``size`` is no size.
    """
    height, width = image_size(model, size)
    device = next(model.parameters()).device
    images = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    keys = ('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape')
    about = {**dict.fromkeys(keys, (height, width)), 'scale_factor': (1.0, 1.0)}

    def run() -> Any:
        with torch.no_grad():
            samples = [BaseDataElement(metainfo=dict(about))]
            return model(images.to(device), samples, mode='tensor')

    return run
