# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""BRECQ: learns the rounding of all layers of a unit by the error of the unit's output.

Source: arXiv 2102.05426 (BRECQ), section 3.3; the rounding is AdaRound's
(arXiv 2004.10568); inputs are mixed as in arXiv 2203.05740 (QDrop), equation 8; the
optional global term is that of GLF-Q, see ``FrozenSuffix``.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...stream import Call, CallStore, Unit
from ...stream.calls import all_tensors
from ...stream.distributed import broadcast_from_0
from ...stream.sampling import BatchSampler, join, mixed, of_all_ranks
from ...stream.unit_stream import run_unit
from ..algorithms import register_weight_ptq
from ..task import PTQTask
from ..unit_ptq import UnitPTQ, round_to_nearest
from .frozen_suffix import FrozenSuffix
from .gptq import GPTQ
from .soft_rounding import (
    SoftRounding,
    annealed_beta,
    only_trainable,
    soft_weights,
    without_checkpointing,
)

STARTS = ('gptq', 'nearest')


@register_weight_ptq('brecq')
class BRECQ(UnitPTQ):
    """Block reconstruction: learn the rounding so that the unit's output is that of stage 1.

    The result of a unit is kept only if it reduces the error on the calibration images,
    measured with hard codes.

    Args:
        steps: Optimizer steps per unit.
        lr: Learning rate of the rounding.
        scale_lr: Learning rate of the logarithm of the weight scales; 0 to keep them.
        bias_lr: Learning rate of the biases, relative to their root mean square; 0 to
            keep them.
        batch_size: Most calls of the unit per step.
        drop: Share of the input elements taken from the stage-1 model, 0 to 1.
        regularization: Weight of the term that drives the rounding to 0 or 1.
        commitment: Initial rounding, between the existing codes (1) and the float weights
            (0).
        start: ``gptq`` or ``nearest``, for layers that no earlier algorithm has rounded.
        max_elements: Most input elements per step; bounds the memory.
        global_weight: Weight of the feature error of the model, computed through the frozen
            units after this one, next to the error of the unit's output, each relative to its
            initial value; 0 for the unit alone. It needs the memory of training with one
            calibration batch.
        global_batches: Calibration batches per step for the feature error.

    Raises:
        ValueError: If an option is out of range.
    """

    needs_reference = True

    def __init__(
        self,
        steps: int = 200,
        lr: float = 5e-2,
        scale_lr: float = 1e-3,
        bias_lr: float = 1e-2,
        batch_size: int = 32,
        drop: float = 0.5,
        regularization: float = 2.0,
        commitment: float = 0.0,
        start: str = 'gptq',
        max_elements: int = 1 << 18,
        global_weight: float = 0.0,
        global_batches: int = 4,
    ) -> None:
        if start not in STARTS or not 0 <= drop <= 1 or min(steps, batch_size) < 1:
            raise ValueError(
                f'brecq start={start!r}, drop={drop!r}, steps={steps!r}, batch_size='
                f'{batch_size!r}: write a start of {STARTS}, a drop from 0 to 1, and positive '
                'integers'
            )
        if not global_weight >= 0 or global_batches < 1:
            raise ValueError(
                f'brecq global_weight={global_weight!r}, global_batches={global_batches!r}: write '
                'a weight of at least 0, e.g. 0.5, and a positive number of batches'
            )
        self.steps, self.lr, self.scale_lr, self.bias_lr = steps, lr, scale_lr, bias_lr
        self.batch_size, self.drop, self.regularization = batch_size, drop, regularization
        self.commitment, self.start, self.max_elements = commitment, start, max_elements
        self.global_weight, self.global_batches = global_weight, global_batches
        self._suffix: FrozenSuffix | None = None

    def begin(self, task: PTQTask, units: Sequence[Unit]) -> None:
        """Store the target features of the global term."""
        self._suffix = FrozenSuffix(task, units) if self.global_weight > 0 else None

    def quantize_unit(
        self, task: PTQTask, unit: Unit, inputs: CallStore, reference: CallStore | None
    ) -> None:
        """As in the base class."""
        self._start(task, unit, inputs)
        inputs = of_all_ranks(inputs, inputs.like())
        if reference is not None:
            reference = of_all_ranks(reference, reference.like())
        suffix = self._suffix if self._suffix is not None and self._suffix.sees(unit) else None
        problem = _Problem(task, unit, inputs, reference)
        if not len(inputs):
            return
        start = copy.deepcopy(unit.module.state_dict())
        objective = _Objective(problem, suffix, self.global_weight)
        with torch.enable_grad():
            self._learn(task, unit, objective)
        if not objective.error() < objective.start:
            unit.module.load_state_dict(start)
        for tensor in unit.module.state_dict().values():
            tensor.copy_(broadcast_from_0(tensor))

    def _start(self, task: PTQTask, unit: Unit, inputs: CallStore) -> None:
        bare = {n for n, la in unit.layers.items() if not la.weight_quantizer.is_calibrated}
        if bare and self.start == 'gptq':
            GPTQ().quantize_unit(task, unit, inputs, None)
        elif bare:
            for name in bare:
                round_to_nearest(task, name)

    def _learn(self, task: PTQTask, unit: Unit, objective: '_Objective') -> None:
        generator = torch.Generator().manual_seed(_seed(task, unit))
        problem, suffix = objective.problem, objective.suffix
        sampler = BatchSampler(problem.inputs, self.batch_size, self.max_elements, generator)
        roundings = [
            SoftRounding(layer, task.float_weights[name], self.scale_lr > 0, self.commitment)
            for name, layer in unit.layers.items()
        ]
        biases = _biases(unit) if self.bias_lr > 0 else []
        optimizer = torch.optim.Adam(self._groups(roundings, biases))
        learned = [p for group in optimizer.param_groups for p in group['params']]
        whole = unit.module if suffix is None else task.model
        with (
            only_trainable(whole, biases),
            soft_weights(roundings),
            without_checkpointing(whole),
        ):
            for step in range(self.steps):
                call, targets = problem.batch(sampler.draw(), self.drop, generator)
                loss = problem.loss(call, targets) / objective.local_start
                beta = annealed_beta(step, self.steps, 0.2, 20, 2)
                penalty = torch.stack([r.regularizer(beta) for r in roundings]).mean()
                if step >= 0.2 * self.steps:
                    loss = loss + self.regularization * penalty
                optimizer.zero_grad()
                loss.backward()
                if suffix is not None:
                    order = torch.randperm(suffix.batches, generator=generator)
                    numbers = order[: self.global_batches].tolist()
                    suffix.add_gradients(learned, numbers, objective.global_factor)
                optimizer.step()
        for rounding in roundings:
            rounding.write()

    def _groups(self, roundings: list[SoftRounding], biases: list[Tensor]) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = [{'params': [r.v for r in roundings], 'lr': self.lr}]
        if self.scale_lr > 0:
            groups.append({'params': [r.log_factor for r in roundings], 'lr': self.scale_lr})
        for bias in biases:
            size = float(bias.detach().square().mean().sqrt().clamp_min(1e-3))
            groups.append({'params': [bias], 'lr': self.bias_lr * size})
        return groups


class _Problem:
    """Inputs of a unit with its target outputs."""

    def __init__(
        self, task: PTQTask, unit: Unit, inputs: CallStore, reference: CallStore | None
    ) -> None:
        self.module, self.inputs = unit.module, inputs
        self.reference = reference if reference is not None else inputs
        self.device = next(unit.module.parameters()).device
        self.targets = inputs.like()
        with torch.no_grad(), task.stage1():
            for call in self.reference:
                self.targets.append(Call((all_tensors(self._run(call)),)))

    def _run(self, call: Call) -> Any:
        return run_unit(self.module, call, self.device)

    def batch(
        self, indices: list[int], drop: float, generator: torch.Generator
    ) -> tuple[Call, list[Tensor]]:
        """Joined inputs, partly from the stage-1 model, and target outputs."""
        call = join([self.inputs[i] for i in indices])
        if drop > 0 and self.reference is not self.inputs:
            other = join([self.reference[i] for i in indices])
            call = mixed(call, other, drop, generator)
        return call, join([self.targets[i] for i in indices]).args[0]

    def loss(self, call: Call, targets: list[Tensor]) -> Tensor:
        """Mean over the unit's output tensors of their mean squared error."""
        outputs = all_tensors(self._run(call))
        parts = [
            (y - w.to(y.device)).square().mean()
            for y, w in zip(outputs, targets, strict=True)
            if y.is_floating_point() and y.numel()
        ]
        return torch.stack(parts).mean()

    @torch.no_grad()
    def error(self) -> float:
        """Mean loss over all calls on the quantized inputs, with the current layers."""
        pairs = zip(self.inputs, self.targets, strict=True)
        losses = [float(self.loss(call, targets.args[0])) for call, targets in pairs]
        return sum(losses) / max(len(losses), 1)


class _Objective:
    """Error of the unit's output and of the features, each relative to its initial value."""

    def __init__(self, problem: _Problem, suffix: FrozenSuffix | None, weight: float) -> None:
        self.problem, self.suffix = problem, suffix
        local, far = problem.error(), 0.0 if suffix is None else suffix.error()
        self.local_start = max(local, 1e-12)
        self.global_factor = weight / max(far, 1e-12)
        self.start = local / self.local_start + self.global_factor * far

    def error(self) -> float:
        """Error with the current layers."""
        far = 0.0 if self.suffix is None else self.suffix.error()
        return self.problem.error() / self.local_start + self.global_factor * far


def _biases(unit: Unit) -> list[Tensor]:
    """Biases of the unit's layers that are their own parameters."""
    return [la.bias for la in unit.layers.values() if isinstance(la.bias, torch.nn.Parameter)]


def _seed(task: PTQTask, unit: Unit) -> int:
    """Seed of a unit: it depends on the run's seed and the unit, so a resumed run agrees."""
    return task.seed * 1_000_003 + sum(ord(c) * (i + 1) for i, c in enumerate(unit.name))
