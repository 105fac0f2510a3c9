# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The gate before the first training step of a run."""

from collections.abc import Callable, Mapping
from typing import Any

from mmengine.logging import print_log
from torch import Tensor, nn

from ....analysis.gate.bit_steps import BitSteps
from ....analysis.gate.gate_check import check_gate
from ....analysis.gate.gate_result import GateResult
from ..checkpoints.run_checkpoint import unwrap
from ..data.calibration_data import CalibrationSet
from ..runner_types import TrainingRunner
from .gate import gate_of_run
from .run_report import RunReport


def check_start(
    runner: TrainingRunner,
    calibration: CalibrationSet,
    float_state: Mapping[str, Tensor],
    report: RunReport,
    calibrate: Callable[[], None],
) -> None:
    """Compare the calibrated model with the float one before the first training step.

    Args:
        runner: TrainingRunner in training; ``recipe.gate`` of its model says what to do.
        calibration: Images that the model was calibrated on.
        float_state: FP32 weights.
        report: Gets the figures as ``calibration.gate``, and the recipe with the added rules.
        calibrate: Calibrates the model as the run did.

    Raises:
        ValueError: If the feature error is above the limit and the gate stops.
    """
    model = unwrap(runner.model)
    settings = model.gplq.recipe.gate
    if settings is None:
        return
    gate = gate_of_run(model, calibration, float_state, settings)

    def add_bits(found: GateResult) -> tuple[GateResult, list[dict[str, Any]]]:
        copies = averaged_models(runner)
        steps = BitSteps(gate, float_state, calibrate, model.test_step, _log, copies)
        result = steps.run(found)
        report.keep_recipe(model.gplq.recipe.as_dict())
        return result

    check_gate(gate, add_bits, lambda found: report.update('calibration', gate=found), _log)


def averaged_models(runner: TrainingRunner) -> list[nn.Module]:
    """Copies of the model that hooks keep (EMA); their quantizers get the same bits."""
    averages = [getattr(hook, 'ema_model', None) for hook in runner.hooks]
    return [average.module for average in averages if average is not None]


def _log(text: str, level: int) -> None:
    print_log(text, 'current', level)
