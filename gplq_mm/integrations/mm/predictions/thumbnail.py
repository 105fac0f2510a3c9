# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""A small JPEG of an image that a data pipeline has loaded."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

LONGEST, QUALITY = 288, 82
"""Pixels of the longer side, and JPEG's quality: about 10 kB an image."""


def thumbnail(inputs: Tensor, sample: Any, preprocessor: Any) -> tuple[str, int, int]:
    """A JPEG as base64, and its width and height.

    Args:
        inputs: Image of the pipeline, ``(C, H, W)``: not normalised by the data preprocessor.
        sample: Its data sample; ``img_shape`` is what of it is image, the rest is padding.
        preprocessor: The model's data preprocessor; it tells the order of the channels.
    """
    height, width = getattr(sample, 'img_shape', inputs.shape[-2:])[:2]
    pixels = inputs[:, :height, :width].detach().cpu().float()
    if inputs.is_floating_point():  # normalised by the pipeline
        pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp(min=1e-6) * 255
    if len(pixels) not in (1, 3):
        pixels = pixels.mean(0, keepdim=True)
    if len(pixels) == 3 and _is_bgr(sample, preprocessor):
        pixels = pixels.flip(0)
    values = pixels.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(np.ascontiguousarray(values.squeeze()))
    image.thumbnail((LONGEST, LONGEST))
    stream = io.BytesIO()
    image.save(stream, 'JPEG', quality=QUALITY)
    return base64.b64encode(stream.getvalue()).decode('ascii'), *image.size


def _is_bgr(sample: Any, preprocessor: Any) -> bool:
    """Whether channels are blue, green, red: as MMCV reads files, or if the model flips them."""
    flips = any(getattr(preprocessor, key, False) for key in ('_channel_conversion', 'to_rgb'))
    return bool(flips or getattr(sample, 'img_path', None))
