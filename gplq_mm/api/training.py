# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""``gplq_mm.train_stage1``: quantization-aware training with float weights, in a simple loop."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from ..distillation.optimizer_groups import (
    make_steps_proportional,
    parameter_groups,
    proportional_ids,
    short_run_factor,
)
from .distilling import Distillation
from .inputs import call_model, model_inputs, to_device
from .model_state import CALIBRATED, LOGGER, STAGE1, device_of, require_stage, state_of

TaskLoss = Callable[[Any, Any], Tensor]
"""Loss of the model's output and the targets of a batch."""


def stage1_optimizer(model: nn.Module, steps: int) -> Optimizer:
    """AdamW with the recipe's settings: one group each for weights, scales, biases and gains.

    Args:
        model: Model of ``gplq_mm.quantize``.
        steps: Optimizer steps of the whole training; a short training has a smaller learning
            rate.

    Returns:
        An optimizer for any training loop; scales, biases and gains take steps
        relative to their size if the recipe says so.

    Raises:
        ValueError: If the model is not calibrated, or nothing trains.
    """
    optim: Any = require_stage(
        model, (CALIBRATED, STAGE1)
    ).recipe.optim  # auto is replaced by numbers
    groups = parameter_groups(model, optim, optim.lr)
    betas = tuple(optim.betas)
    built = AdamW(groups, lr=optim.lr, weight_decay=optim.weight_decay, betas=betas)
    make_steps_proportional(built, model, optim)
    kept = proportional_ids(model, optim)
    for group in built.param_groups:
        if not all(id(p) in kept for p in group['params']):
            group['lr'] *= short_run_factor(optim, steps)
    return built


def train_stage1(
    model: nn.Module,
    teacher: nn.Module,
    loader: Iterable[Any],
    *,
    epochs: int = 1,
    task_loss: TaskLoss | None = F.cross_entropy,
    multi_label: bool = False,
) -> list[float]:
    """Train a calibrated model with its teacher: AdamW, learning rate with a cosine schedule.

    Args:
        model: Model of ``gplq_mm.quantize``, calibrated; changed in place.
        teacher: The float model, see ``gplq_mm.distill``.
        loader: Has a length, and yields ``(inputs, targets)``, both on any device.
        epochs: Passes over the loader. The presets' learning rate of a small classifier was
            chosen for about 390 steps.
        task_loss: Function of the model's output and the targets; None to train with the teacher
            only, with a loader as for ``gplq_mm.calibrate``.
        multi_label: See ``gplq_mm.distill``.

    Returns:
        Mean loss of each epoch.

    Raises:
        ValueError: If the model is not calibrated, the teacher is not float, the loader is
            empty or yields no targets, nothing trains, or the loss is NaN or infinite.
    """
    state = require_stage(model, (CALIBRATED, STAGE1))
    batches = loader if hasattr(loader, '__len__') else list(loader)
    steps = epochs * len(batches)  # type: ignore[arg-type]
    if steps < 1:
        raise ValueError(f'there is nothing to train on: {epochs} epochs of an empty loader')
    objective = _Objective(model, teacher, batches, task_loss, multi_label)
    optimizer = stage1_optimizer(model, steps)
    schedule = CosineAnnealingLR(optimizer, steps)
    was_training, means = model.training, []
    model.train()
    for epoch in range(epochs):
        losses = []
        for batch in batches:
            optimizer.zero_grad(set_to_none=True)
            loss = objective(batch)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        means.append(_mean(losses, epoch))
    model.train(was_training)
    state.stage = STAGE1
    return means


class _Objective:
    """Task loss and mimicking of one batch."""

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        loader: Iterable[Any],
        task_loss: TaskLoss | None,
        multi_label: bool,
    ) -> None:
        self.model, self.task_loss = model, task_loss
        self.mimic: Distillation | None = None
        if state_of(model).recipe.mimic is not None:
            self.mimic = Distillation(model, teacher, loader, multi_label)
        elif task_loss is None:
            raise ValueError('there is no loss: recipe.mimic and task_loss are both None')

    def __call__(self, batch: Any) -> Tensor:
        inputs = model_inputs(batch)
        if self.mimic is None:
            return self._task(call_model(self.model, inputs), batch)
        loss = self.mimic(inputs)
        if self.task_loss is None:
            return loss
        return self.mimic.task_weight * self._task(self.mimic.output, batch) + loss

    def _task(self, output: Any, batch: Any) -> Tensor:
        assert self.task_loss is not None
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ValueError(
                f'the loader yields {type(batch).__name__} without targets; it has to yield '
                '(inputs, targets), or write task_loss=None to train with the teacher only'
            )
        return self.task_loss(output, to_device(batch[1], device_of(self.model)))


def _mean(losses: list[Tensor], epoch: int) -> float:
    mean = float(torch.stack(losses).mean())
    if mean != mean or mean in (float('inf'), float('-inf')):
        raise ValueError(
            f'the loss of epoch {epoch + 1} is {mean}; lower recipe.optim.lr, or check for NaN in '
            'the images'
        )
    LOGGER.info('stage 1, epoch %d: mean loss %.4g', epoch + 1, mean)
    return mean
