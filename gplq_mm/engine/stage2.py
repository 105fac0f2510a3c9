# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Stage 2 within a run: weights of a calibrated stage-1 model, scored and saved."""

import copy
import os
from collections.abc import Mapping
from typing import Any

from mmengine.dist import is_main_process
from mmengine.logging import print_log
from mmengine.runner import Runner

from ..algorithms.stage2 import run_stage2
from ..conversion import quantizers
from .calibration_data import CalibrationSet
from .checkpoint import FINAL_NAME, record, save_snapshot, snapshot, unwrap
from .evaluate import evaluate
from .resources import StageMeter
from .run_report import RunReport


def apply_stage2(
    runner: Runner, recipe: Mapping[str, Any], calibration: CalibrationSet, report: RunReport
) -> None:
    """Quantize the weights of the runner's stage-1 model and score it.

    Args:
        runner: Runner whose model holds stage-1 weights and calibrated activations.
        recipe: Resolved recipe.
        calibration: Images for algorithms that need data.
        report: Has counted the stage-1 model's operations; gets cost, weight errors
            and metrics under ``stage2``.
    """
    model = unwrap(runner.model)
    with StageMeter() as meter:
        run_pass = calibration.run_pass(model, 'stage 2')
        result = run_stage2(model, recipe, run_pass, progress=_log_progress)
    report.update('stage2', **result.as_dict())
    report.update('stage2', seconds=meter.seconds, peak_memory_bytes=meter.peak_memory_bytes)
    report.update_cost('stage2', model, result.side_flops // 2)
    if runner.val_loop is not None:
        report.update('stage2', metrics=evaluate(runner, runner.val_loop, 'stage 2'))


def run(runner: Runner, ptq: str | None = None, out: str | None = None) -> dict[str, float]:
    """Stage 2 alone, on a runner that has loaded a stage-1 checkpoint.

    Args:
        runner: Runner with the checkpoint loaded; need not have trained.
        ptq: Weight algorithm in place of the recipe's.
        out: Final checkpoint; ``gplq_final.pth`` in the work dir if None.

    Returns:
        Metrics of the quantized model.

    Raises:
        ValueError: If the checkpoint is past stage 1, or ``ptq`` is unknown.
    """
    model = unwrap(runner.model)
    _require_stage1(model)
    recipe = copy.deepcopy(model.gplq.recipe)
    if ptq is not None:
        recipe['weight']['ptq'] = ptq
    calibration = CalibrationSet(runner.cfg, **recipe['calibration'])
    report = RunReport(runner.work_dir, resume=True)
    coverage = model.gplq.coverage.as_dict()
    report.describe(recipe, coverage, runner.seed)
    report.count_macs(model, next(iter(calibration)))
    apply_stage2(runner, recipe, calibration, report)
    dataset = runner.val_loop.dataloader.dataset if runner.val_loop else calibration.dataset
    final = snapshot(runner, dataset, through_hooks=False)
    final['gplq'] = {**record(model, 'stage2', _source(runner)), 'recipe': recipe}
    save_snapshot(final, out or os.path.join(runner.work_dir, FINAL_NAME))
    report.log_table()
    return report.data['stage2']['metrics']


def _require_stage1(model: Any) -> None:
    done = [n for n, q in quantizers(model, 'weight').items() if q.is_calibrated]
    if done and not model.gplq.recipe['weight']['qat']:
        raise ValueError(
            f'{done[0]}: the weights are already quantized; load the stage-1 checkpoint, '
            'gplq_stage1.pth'
        )


def _source(runner: Runner) -> Mapping[str, Any]:
    """Identity of the FP32 checkpoint, as the hook read it from the stage-1 checkpoint."""
    return next((h.source for h in runner.hooks if hasattr(h, 'source')), {})


def _log_progress(name: str, index: int, total: int) -> None:
    if is_main_process() and (index + 1 == total or index % max(total // 5, 1) == 0):
        print_log(f'stage 2: {index + 1}/{total} {name}', logger='current')
