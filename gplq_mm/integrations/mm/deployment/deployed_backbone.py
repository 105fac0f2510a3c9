# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""DeployedBackbone: backbone and neck of a detector, computed by another runtime."""

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor

from ....registry import MODELS

RUNTIMES = {'.onnx': 'onnxruntime', '.xml': 'openvino'}
"""Suffix of a file -> runtime that executes it."""


@MODELS.register_module()
class DeployedBackbone(BaseModule):
    """Backbone of a detector's config that runs an exported file of its backbone and neck.

    With ``model = dict(backbone=dict(type='gplq_mm.DeployedBackbone', file='model.onnx'),
    neck=None)`` in a config, the heads and the metrics are those of the float model. Weights of
    backbone and neck in a checkpoint are not used.

    Args:
        file: ``.onnx`` or ``.xml`` file.
        runtime: ``onnxruntime`` or ``openvino``; by the file's suffix if None.
        threads: Threads of the runtime; torch's number if None.
        pad: Whether smaller images are padded with 0 at the right and at the bottom to a fixed
            size of the file; the maps are cut to the part that belongs to the image. Results at the
            padded borders then differ from a model of the image's own size.
        init_cfg: For MMEngine; has no effect, the file holds the weights.

    Raises:
        FileNotFoundError: If there is no such file.
        ModuleNotFoundError: If the runtime is missing.
        ValueError: For another suffix or runtime.
    """

    def __init__(
        self,
        file: str,
        runtime: str | None = None,
        threads: int | None = None,
        pad: bool = False,
        init_cfg: Any = None,
    ) -> None:
        super().__init__(init_cfg)
        expected = RUNTIMES.get(Path(file).suffix)
        if expected is None or runtime not in (None, expected):
            raise ValueError(
                f'file={file!r} with runtime={runtime!r}: write a file and the runtime of its '
                f'suffix, one of {RUNTIMES}'
            )
        self.model = load_model(file, threads)
        self.pad = pad

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Feature maps of normalized images, ``(B, 3, H, W)``, from the largest to the smallest.

        Raises:
            ValueError: If the file has another size.
        """
        if not self.pad:
            return self.model(images)
        sizes = [
            fixed if isinstance(fixed, int) else own
            for fixed, own in zip(self.model.shape[-2:], images.shape[-2:], strict=True)
        ]
        lack = [size - own for size, own in zip(sizes, images.shape[-2:], strict=True)]
        if min(lack) < 0:
            return self.model(images)  # raises, and names both sizes
        maps = self.model(F.pad(images, (0, lack[1], 0, lack[0])))
        return tuple(_cut(x, images, sizes) for x in maps)


def load_model(file: str | Path, threads: int | None = None) -> Any:
    """The runtime's model of a file, called with images, with an attribute ``shape``.

    Args:
        file: ``.onnx`` or ``.xml`` file.
        threads: Threads of the runtime; torch's number if None.
    """
    if Path(file).suffix == '.onnx':
        from ...onnx.onnx_model import OnnxModel

        return OnnxModel(file, threads)
    from ...openvino.openvino_model import OpenVinoModel

    return OpenVinoModel(file, threads)


def _cut(feature_map: Tensor, images: Tensor, sizes: list[int]) -> Tensor:
    height, width = (
        -(-own * length // size)  # rounded up
        for own, length, size in zip(images.shape[-2:], feature_map.shape[-2:], sizes, strict=True)
    )
    return feature_map[..., :height, :width]
