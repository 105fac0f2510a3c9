# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Stage 2 within a run: weights of a calibrated stage-1 model, scored and saved."""

from typing import Any

from mmengine.dist import is_main_process
from mmengine.logging import print_log
from mmengine.runner import Runner

from ..algorithms.stage2 import Stage2Result, run_stage2
from .calibration_data import CalibrationSet
from .checkpoint import unwrap


def quantize_weights(runner: Runner, calibration: CalibrationSet) -> Stage2Result:
    """Run the recipe's weight PTQ and compensation on the runner's model.

    Args:
        runner: Runner whose model holds stage-1 weights and calibrated activations.
        calibration: Images for algorithms that need data.

    Returns:
        Per-layer results and the cost of side branches.
    """
    model = unwrap(runner.model)
    was_training = model.training
    model.eval()
    result = run_stage2(
        model,
        model.gplq.recipe,  # type: ignore[union-attr, arg-type]
        calibration.run_pass(model, 'stage 2'),
        progress=_log_progress,
    )
    model.train(was_training)
    return result


def _log_progress(name: str, index: int, total: int) -> None:
    if is_main_process() and (index == total or index % max(total // 5, 1) == 0):
        print_log(f'stage 2: {index}/{total} {name}', logger='current')


def summary(result: Stage2Result) -> dict[str, Any]:
    """Plain data for the report."""
    return result.as_dict()
