# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Change of the model's output by stage 2, as a signal-to-noise ratio."""

from typing import Any

import torch
from mmengine.logging import print_log

from ....analysis.output_metrics import Outputs
from ....stream.distributed import gather
from ..data.calibration_data import CalibrationSet
from ..data.model_outputs import build_comparison

DETECTOR_IMAGES, CLASSIFIER_IMAGES = 8, 128
"""Images per rank: a detector gives thousands of numbers for one, a classifier its logits."""


class OutputProbe:
    """Stores the outputs for a few training images and compares later outputs with them.

    Outputs are features if the scope ends before the heads (a detector's neck), else the
    outputs of the heads: logits, or the first detection stage and, for the stage-1 model's
    proposals, the second. If a model does not give them, the log says why and the ratio is None:
    a missing measurement does not stop a run.

    Args:
        model: The stage-1 model.
        images: Images of stage 2. The probe takes other ones, which no algorithm has fitted, if
            the training set has any.
    """

    def __init__(self, model: Any, images: CalibrationSet) -> None:
        self.model = model
        self.metric, self.outputs_of = build_comparison(model, 'sqnr')
        requested = DETECTOR_IMAGES if model.gplq.is_detector else CLASSIFIER_IMAGES
        self.batches = images.others(-(-requested // len(images.batches[0])))
        self.before = self._first_outputs()

    def sqnr_db(self) -> float | None:
        """Signal-to-noise ratio of the current model, in dB; None without noise."""
        pairs = zip(self.before, self._outputs() if self.before else [], strict=True)
        mine = [self.metric.terms(before, now) for before, now in pairs]
        terms = [t for share in gather(mine) for t in share]  # a rank may have no image
        if not terms:
            return None
        score = self.metric.score(self.metric.increase(torch.stack(terms).sum(0)))
        return None if score is None else round(score, 3)

    def _first_outputs(self) -> list[Outputs]:
        was_training = self.model.training
        try:
            return self._outputs()
        except Exception as error:  # a project's head may raise anything
            print_log(f'output SQNR is left out: {error!r}', logger='current')
            self.model.train(was_training)
            return []

    @torch.no_grad()
    def _outputs(self) -> list[Outputs]:
        was_training = self.model.training
        self.model.eval()
        found: list[Outputs] = [
            [t.cpu() for t in self.outputs_of((index, batch))]
            for index, batch in enumerate(self.batches)
        ]
        self.model.train(was_training)
        return found
