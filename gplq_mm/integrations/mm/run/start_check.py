# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Action of a run at the gate: pass, stop, warn, or add bits and calibrate again."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmengine.logging import print_log
from mmengine.runner import Runner
from torch import Tensor, nn

from ....analysis import MacCount, bit_operations, count_macs, model_bytes
from ....analysis.added_bits import ADD_BITS, add_bits_, bit_rules_of_roles
from ....analysis.operands import Precision, find_operands, quantized_as
from ....analysis.start_error import WEIGHTS
from ....convert import quantizers
from ....recipe import Recipe
from ..checkpoints.run_checkpoint import unwrap
from ..data.calibration_data import CalibrationSet
from .gate import COSTLIEST, Gate, GateResult, log_roles, remedy
from .run_report import RunReport

STEPS = (6, 8)
"""Bits that the roles with the largest error get, in this order, until the gate is passed."""


def check_start(
    runner: Runner,
    calibration: CalibrationSet,
    float_state: Mapping[str, Tensor],
    report: RunReport,
    calibrate: Callable[[], None],
) -> None:
    """Compare the calibrated model with the float one before the first training step.

    Args:
        runner: Runner in training; ``recipe.gate`` of its model says what to do.
        calibration: Images that the model was calibrated on.
        float_state: FP32 weights.
        report: Gets the figures as ``calibration.gate``.
        calibrate: Calibrates the model as the run did.

    Raises:
        ValueError: If the feature error is above the limit and the gate stops.
    """
    model = unwrap(runner.model)
    settings = model.gplq.recipe.gate
    if settings is None:
        return
    gate = Gate(model, calibration, float_state, settings)
    problem = gate.unavailable()
    if problem is not None:
        print_log(f'gate: skipped, the model gives no features: {problem}', 'current')
        return
    found, action = gate.measure(), gate.settings.action
    steps: list[dict[str, Any]] = []
    if not found.passed and action == ADD_BITS:
        found, steps = BitSteps(runner, gate, report, calibrate).run(found)
    report.update('calibration', gate={**found.as_dict(), **({'steps': steps} if steps else {})})
    if found.passed:
        print_log(f'gate: {found.line}', logger='current')
        return
    log_roles(found)
    if action != 'warn':
        raise ValueError(remedy(found, action))
    print_log(f'gate: {remedy(found, action)}', 'current', logging.WARNING)


class BitSteps:
    """Gives the roles with the largest error 6, then 8 bits, until the gate is passed.

    Args:
        runner: Runner in training.
        gate: The gate, which the model has not passed.
        report: Gets the recipe with the added rules.
        calibrate: Calibrates the model.
    """

    def __init__(
        self, runner: Runner, gate: Gate, report: RunReport, calibrate: Callable[[], None]
    ) -> None:
        self.gate = gate
        self.model: Any = gate.model
        self.report = report
        self.calibrate = calibrate
        self.copies = averaged_models(runner)
        self.recipe: Recipe = self.model.gplq.recipe
        self.macs = self._count_macs(gate.images.load(0))

    def run(self, found: GateResult) -> tuple[GateResult, list[dict[str, Any]]]:
        """Add bits until the gate is passed or no step is left.

        Args:
            found: First result of the gate.

        Returns:
            Last result of the gate, and the steps: added bits, feature error, cost.
        """
        own, roles = self.recipe.rules, self._costliest(found)
        steps = [self._step({}, found)]
        for num_bits in STEPS:
            if found.passed or not roles:
                break
            rules = bit_rules_of_roles(self.model, roles, num_bits)
            changed = [add_bits_(m, roles, num_bits) for m in (self.model, *self.copies)]
            if not changed[0]:
                continue
            self.recipe = self.recipe.change(rules=[*own, *rules])
            self.model.gplq.recipe = self.recipe
            self._calibrate()
            found = self.gate.measure()
            steps.append(self._step(dict.fromkeys(roles, num_bits), found))
            self._log(steps)
        self.report.keep_recipe(self.recipe.as_dict())
        return found, steps

    def _costliest(self, found: GateResult) -> list[str]:
        """Roles of activations with the largest error whose bits can be increased."""
        bits = {r.role: self._least_bits(r.role) for r in found.roles if r.role != WEIGHTS}
        return [role for role, least in bits.items() if least < STEPS[-1]][:COSTLIEST]

    def _least_bits(self, role: str) -> int:
        found = quantizers(self.model, 'activation').values()
        return min(q.spec.num_bits for q in found if q.role == role)

    def _calibrate(self) -> None:
        """Calibrate again, from the float model."""
        self.model.load_state_dict(self.gate.float_state, strict=False)
        for quantizer in quantizers(self.model).values():
            quantizer.reset()
        self.calibrate()

    def _step(self, bits: Mapping[str, int], found: GateResult) -> dict[str, Any]:
        bops, size = cost_after_stage2(self.model, self.macs)
        error = found.figures.feature_error
        return {'bits': dict(bits), 'feature_error': error, 'bops': bops, 'model_bytes': size}

    def _count_macs(self, batch: Any) -> MacCount:
        training = self.model.training
        macs = count_macs(self.model.eval(), lambda: self.model.test_step(batch))
        self.model.train(training)
        return macs

    def _log(self, steps: Sequence[Mapping[str, Any]]) -> None:
        first, before, now = steps[0], steps[-2], steps[-1]
        added = ', '.join(f'{role} {bits} bits' for role, bits in now['bits'].items())
        print_log(
            f'gate: {added}: feature error {before["feature_error"]:.2g} -> '
            f'{now["feature_error"]:.2g}, {now["bops"] / 1e9:.4g} G bit operations instead of '
            f'{first["bops"] / 1e9:.4g} G, {now["model_bytes"] / 2**20:.2f} MiB instead of '
            f'{first["model_bytes"] / 2**20:.2f}',
            logger='current',
        )


def averaged_models(runner: Runner) -> list[nn.Module]:
    """Copies of the model that hooks keep (EMA); their quantizers get the same bits."""
    averages = [getattr(hook, 'ema_model', None) for hook in runner.hooks]
    return [average.module for average in averages if average is not None]


def cost_after_stage2(model: nn.Module, macs: MacCount) -> tuple[int, int]:
    """Bit operations and packed bytes with the current activations and quantized weights.

    Args:
        model: Converted and calibrated model.
        macs: Multiply-accumulates of one forward pass.
    """
    planned = {}
    if quantizers(model, 'weight'):
        for operand in find_operands(model, kinds=('weight',)).values():
            quantizer: Any = model.get_submodule(operand.path)
            ones = quantizer.scale.new_ones(quantizer.scale.shape)
            planned[operand.path] = Precision(quantizer.spec, ones, ones - 1)
    with quantized_as(model, planned):
        return bit_operations(model, macs), model_bytes(model)
