# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Global reconstruction: learns all roundings, scales and biases by the feature error.

Source: the global term of GLF-Q (penultimate feature of a classifier, RoI features of a
detector), here for all blocks at once, after an algorithm that rounds them one by one;
rounding as in AdaRound (arXiv 2004.10568).
"""

import copy
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...stream import Unit, find_units
from ...stream.distributed import broadcast_from_0
from ..algorithms import register_weight_ptq
from ..finished_units import FinishedUnits
from ..task import CORRECTS, PTQTask, WeightPTQ
from .feature_source import feature_source
from .soft_rounding import (
    SoftRounding,
    annealed_beta,
    only_trainable,
    soft_weights,
    without_checkpointing,
)
from .target_features import TrainedFeatures


@register_weight_ptq('global')
class GlobalReconstruction(WeightPTQ):
    """Learn roundings, scales and biases so that the features are those of the stage-1 model.

    Features are those of ``feature_source``: input and output of the first quantized head
    (penultimate feature and logits of a classifier), what an integration registered for its
    models (RoI features of a detector), or the result of the forward pass. The squared error
    of each tensor is divided by its power.
    The result is kept only if it reduces this error, measured with hard codes. Put it
    after an algorithm that rounds: ``ptq=['gptq', 'global']``. It needs the memory of
    training with one calibration batch.

    Args:
        steps: Optimizer steps.
        lr: Learning rate of the rounding; 0 keeps all codes.
        scale_lr: Learning rate of the logarithm of the weight scales; 0 to keep them.
        affine_lr: Learning rate of biases and normalization parameters, relative to their
            root mean square; 0 to keep them.
        batches: Calibration batches per step.
        regularization: Weight of the term that drives the rounding to 0 or 1.
        commitment: Initial rounding, between the existing codes (1) and the float weights
            (0).

    Raises:
        ValueError: If an option is out of range.
    """

    needs_data: ClassVar[bool] = True
    phase: ClassVar[str] = CORRECTS

    def __init__(
        self,
        steps: int = 100,
        lr: float = 2e-2,
        scale_lr: float = 2e-3,
        affine_lr: float = 1e-2,
        batches: int = 4,
        regularization: float = 2.0,
        commitment: float = 0.7,
    ) -> None:
        if steps < 1 or batches < 1 or min(lr, scale_lr, affine_lr) < 0:
            raise ValueError(
                f'global steps={steps!r}, batches={batches!r}, lr={lr!r}: write positive numbers'
            )
        self.steps, self.lr, self.scale_lr, self.affine_lr = steps, lr, scale_lr, affine_lr
        self.batches, self.regularization, self.commitment = batches, regularization, commitment

    def apply(self, task: PTQTask) -> None:
        """Train in passes over all calibration images until the steps are done."""
        assert task.run_pass is not None
        title = f'{self.name} {vars(self)} {task.seed} {task.data_key}'
        finished = FinishedUnits(task.folder, title, task.model)
        if finished.restore(0, task.model):
            return
        units = find_units(task.model, task.layers, task.run_pass)
        source, units = feature_source(task.model, units)
        problem = TrainedFeatures(task, source, task.budget_bytes)
        before = problem.error()
        start = copy.deepcopy(task.model.state_dict())
        layers = {n: la for unit in units for n, la in unit.layers.items()}
        roundings = [
            SoftRounding(layer, task.float_weights[n], self.scale_lr > 0, self.commitment)
            for n, layer in layers.items()
        ]
        affine = _affine_parameters(units) if self.affine_lr > 0 else []
        with (
            only_trainable(task.model, affine),
            soft_weights(roundings),
            without_checkpointing(task.model),
        ):
            self._learn(task, problem, roundings, affine)
        for rounding in roundings:
            rounding.write()
        if not problem.error() < before:
            task.model.load_state_dict(start)
            task.note('global: undone, since the feature error did not fall')
        for tensor in task.model.state_dict().values():
            tensor.copy_(broadcast_from_0(tensor))
        finished.save(0, task.model)

    def _learn(
        self,
        task: PTQTask,
        problem: TrainedFeatures,
        roundings: list[SoftRounding],
        affine: list[Tensor],
    ) -> None:
        groups = [
            {'params': [r.v for r in roundings], 'lr': self.lr},
            {'params': [r.log_factor for r in roundings], 'lr': self.scale_lr},
        ]
        for p in affine:
            size = float(p.detach().square().mean().sqrt().clamp_min(1e-3))
            groups.append({'params': [p], 'lr': self.affine_lr * size})
        optimizer = torch.optim.Adam(groups)
        learned = [p for g in groups for p in g['params'] if p.requires_grad]  # type: ignore[attr-defined]
        done = 0

        def step() -> None:
            nonlocal done
            if done % max(self.steps // 10, 1) == 0:
                task.report(f'global step {done + 1}', done, self.steps)
            self._penalize(roundings, done)
            optimizer.step()
            done += 1

        while done < self.steps:
            problem.train(learned, self.batches, step, lambda: done < self.steps)

    def _penalize(self, roundings: list[SoftRounding], done: int) -> None:
        """Add the gradient of the regulariser."""
        if done < 0.2 * self.steps or self.lr == 0:
            return
        beta = annealed_beta(done, self.steps, 0.2, 20, 2)
        with torch.enable_grad():
            penalty = torch.stack([r.regularizer(beta) for r in roundings]).mean()
            (self.regularization * penalty).backward(inputs=[r.v for r in roundings])


def _affine_parameters(units: list[Unit]) -> list[Tensor]:
    """Biases of the layers, and weights and biases of the normalizations in their units."""
    found: dict[int, Tensor] = {}
    for unit in units:
        for layer in unit.layers.values():
            if isinstance(layer.bias, nn.Parameter):
                found[id(layer.bias)] = layer.bias
        for module in unit.module.modules():
            if isinstance(module, nn.LayerNorm | nn.GroupNorm):
                found.update({id(p): p for p in module.parameters(recurse=False)})
    return list(found.values())
