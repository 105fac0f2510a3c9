# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Feature error of the model as a function of one unit, through the units after it.

Source: the global term of GLF-Q's block-by-block training: the penultimate feature through the
frozen suffix (RoI features of a detector).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...stream import Call, CallStore, Unit
from ...stream.distributed import all_reduce_sum, world
from ..task import PTQTask
from .feature_source import feature_source
from .target_features import TargetFeatures

CHECKED = 8
"""Batches on which the error of a unit is measured."""


class FrozenSuffix(TargetFeatures):
    """Error of the model's features relative to those of stage 1, one batch at a time.

    Units before the current one are quantized, those after it are not changed. Inputs and
    target features are stored in one pass over the images, each with a quarter of the
    budget in memory and the rest on disk.

    Args:
        task: The task.
        units: All units, in execution order.
    """

    def __init__(self, task: PTQTask, units: Sequence[Unit]) -> None:
        source, reached = feature_source(task.model, units)
        self._reached = {unit.name for unit in reached}
        self._device = next(task.model.parameters()).device
        self._forwards: list[Callable[..., Any]] = []
        self._inputs = CallStore(task.budget_bytes // 4, task.folder)
        super().__init__(task, source, task.budget_bytes // 4)

    def keep(self, run: partial[Any]) -> None:
        """Store the features as in the base class, and the model's inputs."""
        self._forwards.append(run.func)
        self._inputs.append(Call(run.args, run.keywords))
        super().keep(run)

    def sees(self, unit: Unit) -> bool:
        """Whether the features depend on a unit: the last head of a detector comes after them."""
        return unit.name in self._reached

    def _loss_of(self, number: int) -> Tensor | None:
        """Relative error of a batch's features; None for a batch of another rank."""
        index, owner = divmod(number, world()[1])
        if owner != world()[0]:
            return None
        call = self._inputs[index].map(lambda t: t.to(self._device))
        run = partial(self._forwards[index], *call.args, **call.kwargs)
        return self.loss(run, index)

    @torch.no_grad()
    def error(self) -> float:
        """Mean relative error over the first batches, the same on all ranks."""
        losses = torch.zeros(min(self.batches, CHECKED), dtype=torch.float64)
        for number in range(len(losses)):
            loss = self._loss_of(number)
            losses[number] = 0.0 if loss is None else float(loss)
        all_reduce_sum(losses)  # exact: one rank's value and zeros
        return float(losses.mean())

    def add_gradients(
        self, parameters: Sequence[Tensor], numbers: Sequence[int], weight: float
    ) -> None:
        """Add gradients of ``weight`` times the mean error of some batches, equal on all ranks.

        Args:
            parameters: Parameters of any shape whose gradients are increased.
            numbers: Indices of batches, below ``batches``.
            weight: Factor of the mean.
        """
        for number in numbers:
            loss = self._loss_of(number)
            found = _gradients(loss, parameters)
            all_reduce_sum(found)  # exact: one rank's values and zeros
            parts = found.split([p.numel() for p in parameters])
            for parameter, part in zip(parameters, parts, strict=True):
                grad = (weight / len(numbers)) * part.view_as(parameter)
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad


def _gradients(loss: Tensor | None, parameters: Sequence[Tensor]) -> Tensor:
    """Gradients in one vector; zeros without a loss."""
    if loss is None or not loss.requires_grad:
        return torch.cat([torch.zeros_like(p).flatten() for p in parameters])
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, parameters, materialize_grads=True)]
    )
