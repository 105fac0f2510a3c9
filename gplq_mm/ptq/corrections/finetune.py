# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Fine-tuning after rounding: trains biases, normalization and LayerScale with fixed codes.

Source: the parameters are those of Norm Tweaking (arXiv 2309.02784) with the biases; training
them end to end with weights fixed on their grid is the second phase of EfficientQAT
(arXiv 2407.11062). The loss is the relative error of the float model's features.
"""

import math
from collections.abc import Iterable
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from ...distillation.optimizer_groups import biases_and_gains, step_in_proportion
from ...stream import find_units
from ...stream.distributed import broadcast_from_0
from ..algorithms import register_weight_ptq
from ..finished_units import FinishedUnits
from ..rounding.feature_source import feature_source
from ..rounding.soft_rounding import only_trainable, without_checkpointing
from ..rounding.target_features import TrainedFeatures
from ..task import CORRECTS, PTQTask, WeightPTQ

_WARM_UP = 3
"""Warm-up steps of the learning rate."""
_HELD_OUT = 16
"""One of this many batches is held out; the result is kept if the held-out error falls."""


@register_weight_ptq('finetune')
class FineTuning(WeightPTQ):
    """Train biases, normalization and LayerScale on the features of the float model.

    The features are those of ``GlobalReconstruction``: for a classifier the input and output
    of its head. Without a float model they are those of the stage-1 model. Steps are
    proportional to each parameter, see ``ProportionalSteps``. The result is kept if the error
    on held-out batches falls. It needs the memory of training with one calibration batch.

    Args:
        num_images: Most training images; all if there are fewer.
        epochs: Number of passes over them.
        lr: Learning rate relative to a parameter's size; three steps of warm-up, then a
            cosine to zero.
        batches: Calibration batches per step, over all ranks.

    Raises:
        ValueError: If an option is out of range.
    """

    needs_data: ClassVar[bool] = True
    uses_float_model: ClassVar[bool] = True
    phase: ClassVar[str] = CORRECTS

    def __init__(
        self, num_images: int = 1024, epochs: int = 1, lr: float = 1.5e-3, batches: int = 2
    ) -> None:
        if min(num_images, epochs, batches) < 1 or not lr > 0:
            raise ValueError(
                f'finetune num_images={num_images!r}, epochs={epochs!r}, lr={lr!r}, batches='
                f'{batches!r}: write positive numbers'
            )
        self.num_images, self.epochs, self.lr, self.batches = num_images, epochs, lr, batches

    def apply(self, task: PTQTask) -> None:
        """Train on the training images."""
        assert task.run_pass is not None
        title = f'{self.name} {vars(self)} {task.seed} {task.data_key}'
        finished = FinishedUnits(task.folder, title, task.model)
        if finished.restore(0, task.model):
            return
        if task.float_model is None:
            task.note('finetune: there is no float model; its targets are the features of stage 1')
        source, _ = feature_source(task.model, find_units(task.model, task.layers, task.run_pass))
        images = task.more_images(self.num_images) if task.more_images else task.run_pass
        learned = vectors_of(task.model, task.layers)
        start = {name: p.detach().clone() for name, p in learned.items()}
        with (
            only_trainable(task.model, learned.values()),
            without_checkpointing(task.model),
        ):
            problem = TrainedFeatures(
                task, source, task.budget_bytes, images, task.float_model, held_out=_HELD_OUT
            )
            if problem.trained < 1:
                task.note(
                    'finetune: skipped, since all images are one batch and none can be held out; '
                    'give more images, or a smaller recipe.calibration.batch_size'
                )
                return
            before = problem.error(problem.trained)
            after = self._learn(task, problem, learned)
        if not after < before:
            for name, parameter in learned.items():
                parameter.detach().copy_(start[name])
            task.note('finetune: undone, since the feature error of held-out images did not fall')
        for parameter in learned.values():
            parameter.detach().copy_(broadcast_from_0(parameter.detach()))
        finished.save(0, task.model)

    def _learn(
        self, task: PTQTask, problem: TrainedFeatures, learned: dict[str, nn.Parameter]
    ) -> float:
        """Train; returns the error of the held-out batches."""
        steps = self.epochs * -(-problem.trained // self.batches)
        parameters = list(learned.values())
        optimizer = torch.optim.Adam(parameters, lr=self.lr, betas=(0.9, 0.95))
        step_in_proportion(optimizer, learned)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(learning_rate, steps=steps))
        done = 0

        def step() -> None:
            nonlocal done
            if done % max(steps // 10, 1) == 0:
                task.report(f'finetune step {done + 1}', done, steps)
            optimizer.step()
            schedule.step()
            done += 1

        errors = [problem.train(parameters, self.batches, step) for _ in range(self.epochs)]
        return errors[-1]


def vectors_of(model: nn.Module, layers: Iterable[str]) -> dict[str, nn.Parameter]:
    """Biases and gains of the top-level modules that contain quantized layers, by name.

    Args:
        model: Converted model.
        layers: Names of its quantized layers.
    """
    parts = {name.partition('.')[0] for name in layers}
    found = biases_and_gains(model).items()
    return {name: p for name, p in found if name.partition('.')[0] in parts}


def learning_rate(step: int, steps: int) -> float:
    """Factor of the learning rate: a short warm-up, then half a cosine.

    Examples:
        >>> [round(learning_rate(s, 8), 2) for s in (0, 1, 4, 8)]
        [0.33, 0.64, 0.5, 0.0]
    """
    return min(1.0, (step + 1) / _WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
