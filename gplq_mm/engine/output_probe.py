# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""How far stage 2 moved the model's output."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..algorithms.distributed import world
from ..algorithms.streaming.calls import all_tensors
from .calibration_data import CalibrationSet

IMAGES = 8


class OutputProbe:
    """Keeps the features of a few calibration images and compares those of later.

    The output is what ``extract_feat`` gives: a classifier's penultimate feature, a
    detector's neck; the raw output where a model has no ``extract_feat``.

    Args:
        model: The stage-1 model.
        images: Its first ``IMAGES`` batches of this rank are used.
    """

    def __init__(self, model: Any, images: CalibrationSet) -> None:
        self.model = model
        self.batches = [batch for batch, _ in zip(images, range(IMAGES), strict=False)]
        self.before = [self._features(batch) for batch in self.batches]

    def sqnr_db(self) -> float | None:
        """Signal to noise ratio of the model as it is now, in dB; None without noise."""
        sums = torch.zeros(2, dtype=torch.float64)
        for batch, before in zip(self.batches, self.before, strict=True):
            for x, y in zip(before, self._features(batch), strict=True):
                noise = (x.double() - y.double()).square().sum()
                sums += torch.stack([x.double().square().sum(), noise])
        if world()[1] > 1:
            device = next(self.model.parameters()).device
            sums = sums.to(device)
            dist.all_reduce(sums)
        signal, noise = sums.tolist()
        return (
            None if min(signal, noise) <= 0 else round(float(10 * (sums[0] / sums[1]).log10()), 3)
        )

    @torch.no_grad()
    def _features(self, batch: Any) -> list[Tensor]:
        was_training = self.model.training
        self.model.eval()
        data = self.model.data_preprocessor(batch, False)
        if hasattr(self.model, 'extract_feat'):
            output = self.model.extract_feat(data['inputs'])
        else:
            output = self.model(**data, mode='tensor')
        self.model.train(was_training)
        return [t.cpu() for t in all_tensors(output) if t.is_floating_point()]
