# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Stage 2 within a run: weights of a calibrated stage-1 model, scored and saved."""

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.logging import MMLogger, print_log

from ....analysis import REPORT_NAME
from ....analysis.start_error import as_float_model
from ....convert import quantizers
from ....ptq import build_weight_ptq
from ....ptq.algorithms import PTQConfig
from ....ptq.stage2 import run_stage2
from ....quantizers import integer_range
from ....recipe import Recipe, RecipeLike, as_recipe, ptq_of, sets_bits
from ..checkpoints.run_checkpoint import (
    FINAL_NAME,
    record,
    save_snapshot,
    short_sha256,
    snapshot,
    unwrap,
)
from ..data.calibration_data import CalibrationSet
from ..predictions.example_search import ExampleSearch
from ..predictions.prediction_log import ClassAccuracy, classes_of
from ..runner_types import DataLoop, TrainingRunner
from .deployed_figures import report_deployed
from .evaluate import evaluate, validation_key
from .gate import gate_of_run
from .output_probe import OutputProbe
from .progress import ProgressLog
from .resources import StageMeter
from .run_report import RunReport
from .teacher import read_float

UNITS_FOLDER = 'gplq_stage2_units'
"""Folder in the work dir for the finished parts of a killed stage 2."""


def stage2_set(cfg: Config, recipe: RecipeLike, calibration: CalibrationSet) -> CalibrationSet:
    """Images of stage 2: the recipe's number, at most the training set.

    Args:
        cfg: The run's config.
        recipe: Resolved recipe; ``stage2.num_images`` decides.
        calibration: Used if the recipe gives no number.
    """
    requested = as_recipe(recipe).after_training.num_images
    if requested is None or requested == len(calibration.indices):
        return calibration
    number = min(requested, len(calibration.dataset))
    if number < requested:
        print_log(
            f'stage 2: {requested} images asked for, the training set has {number}', 'current'
        )
    return CalibrationSet.of_recipe(cfg, recipe, number)


def apply_stage2(
    runner: TrainingRunner, recipe: Recipe, calibration: CalibrationSet, report: RunReport
) -> None:
    """Quantize the weights of the runner's stage-1 model and score it.

    Finished parts of the model are stored in the work dir until stage 2 is done, so that a
    killed run resumes.

    Args:
        runner: TrainingRunner whose model holds stage-1 weights and calibrated activations.
        recipe: Resolved recipe.
        calibration: Images for algorithms that need data, unless the recipe asks for
            another number.
        report: Holds the operation count of the stage-1 model; gets cost, weight errors
            and metrics under ``stage2``.
    """
    model = unwrap(runner.model)
    images = stage2_set(runner.cfg, recipe, calibration)
    # one folder per algorithm: a finished one does not delete the units of the others
    folder = os.path.join(runner.work_dir, UNITS_FOLDER, short_sha256(recipe.weight.as_dict()))
    probe = OutputProbe(model, images)
    source = _source(runner)
    is_there = os.path.isfile(str(source.get('path', '')))
    before, log = report.take_unfinished('stage2'), ProgressLog('stage 2')
    with StageMeter() as meter:

        def progress(name: str, index: int, total: int) -> None:
            report.keep_unfinished('stage2', before + meter.elapsed())
            log(name, index, total)

        run_pass = images.run_pass(model, 'stage 2')
        result = run_stage2(
            model,
            recipe,
            run_pass,
            progress,
            MMLogger.get_current_instance(),
            seed=recipe.calibration.seed,
            folder=folder,
            data_key=short_sha256((images.paths, images.batches)),
            float_model=partial(_as_float_checkpoint, model, source) if is_there else None,
            more_images=partial(_more_images, model, images),
        )
    report.update('stage2', **result.as_dict(), sqnr_db=probe.sqnr_db())
    report.take_unfinished('stage2')
    peak = meter.peak_memory_bytes
    report.update('stage2', seconds=before + meter.seconds, peak_memory_bytes=peak)
    report.update_cost('stage2', model, result.side_flops // 2)
    if runner.val_loop is not None:
        _score_final(runner, runner.val_loop, model, report)
    if is_main_process():
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # folders of other algorithms remain
            os.rmdir(os.path.dirname(folder))


def _score_final(runner: TrainingRunner, loop: DataLoop, model: Any, report: RunReport) -> None:
    """Metrics of the quantized model, and the images on which it differs from FP32."""
    examples = ExampleSearch(report.path, loop, model.data_preprocessor)
    by_class = ClassAccuracy(classes_of(loop))
    watchers = examples.watch, by_class.watch
    metrics = evaluate(runner, loop, 'stage 2', watchers)
    report.update('stage2', metrics=metrics, per_class=by_class.as_dict())
    if is_main_process():
        examples.write()


def measure_final(
    model: Any, calibration: CalibrationSet, source: Mapping[str, Any], report: RunReport
) -> None:
    """Record the feature error after both stages, on the images of the gate.

    Args:
        model: Model with quantized weights; without a gate in its recipe nothing is measured.
        calibration: Images that it was calibrated on.
        source: Identity of its FP32 checkpoint, without which nothing is measured.
        report: Gets ``stage2.feature_error``.
    """
    settings = model.gplq.recipe.gate
    if settings is None or not os.path.isfile(str(source.get('path', ''))):
        return
    try:
        float_state = read_float(source)
    except ValueError as error:
        print_log(f'feature error after both stages is left out: {error}', 'current')
        return
    gate = gate_of_run(model, calibration, float_state, settings)
    if gate.unavailable() is None:
        error_of_features = gate.figures().feature_error
        report.update('stage2', feature_error=error_of_features)
        print_log(f'feature error after both stages: {error_of_features:.3g}', logger='current')


def run(
    runner: TrainingRunner,
    ptq: PTQConfig | None = None,
    out: str | None = None,
    bits: int | None = None,
) -> RunReport:
    """Stage 2 alone, on a runner that has loaded a stage-1 checkpoint.

    Args:
        runner: TrainingRunner with the checkpoint loaded; no training is required.
        ptq: Weight algorithms, joined by ``+``; the recipe's if None.
        out: Final checkpoint; ``gplq_final.pth`` in the work dir if None.
        bits: Weight bits; the recipe's if None.

    Returns:
        The report, written to the checkpoint's folder: ``gplq_report.json`` for
        ``gplq_final.pth``, ``NAME_report.json`` for any other ``NAME.pth``.

    Raises:
        ValueError: If the checkpoint is past stage 1, or ``ptq`` is unknown.
    """
    model = unwrap(runner.model)
    _require_stage1(model)
    recipe: Recipe = model.gplq.recipe
    if ptq is not None:
        recipe = recipe.change(weight=recipe.weight.change(ptq=ptq))
    if bits is not None:
        set_weight_bits(model, bits)
        recipe = recipe.change(weight=recipe.weight.change(num_bits=bits))
    build_weight_ptq(ptq_of(recipe))
    calibration = CalibrationSet.of_recipe(runner.cfg, recipe)
    out = out or os.path.join(runner.work_dir, FINAL_NAME)
    report = RunReport(runner.work_dir, resume=True)
    report.path = report_path(out)
    coverage = model.gplq.coverage.as_tree_dict()
    engine = report.data.get('engine', '')
    validation = validation_key(runner.cfg)
    report.describe(recipe.as_dict(), coverage, runner.seed, engine, validation, runner.timestamp)
    report.count_macs(model, next(iter(calibration)))
    apply_stage2(runner, recipe, calibration, report)
    dataset = runner.val_loop.dataloader.dataset if runner.val_loop else calibration.dataset
    final = snapshot(runner, dataset, through_hooks=False)
    final['gplq'] = {**record(model, 'stage2', _source(runner)), 'recipe': recipe.as_dict()}
    save_snapshot(final, out)
    measure_final(model, calibration, _source(runner), report)
    report_deployed(model, final, out, _packed_format(runner), calibration, report)
    report.log_table()
    return report


def report_path(checkpoint: str) -> Path:
    """The report of a final checkpoint.

    Examples:
        >>> report_path('x/gplq_final.pth').name, report_path('x/gplq_final_mse.pth').name
        ('gplq_report.json', 'gplq_final_mse_report.json')
    """
    path = Path(checkpoint)
    return path.with_name(REPORT_NAME if path.name == FINAL_NAME else f'{path.stem}_report.json')


def set_weight_bits(model: Any, bits: int) -> None:
    """Change the bits of all weights, except where a rule sets them.

    Args:
        model: Converted stage-1 model.
        bits: 2 to 8.

    Raises:
        ValueError: If ``bits`` is out of range, or weights were trained on their grid
            (``weight.qat``) with bits that no rule sets.
    """
    rules = model.gplq.recipe.rules
    integer_range(bits, signed=True)
    changed = {
        path: quantizer
        for path, quantizer in quantizers(model, 'weight').items()
        if not sets_bits(rules, 'weight', path.rpartition('.')[0], quantizer.role)
    }
    trained = [path.rpartition('.')[0] for path, q in changed.items() if q.spec.learn_scale]
    if trained or model.gplq.recipe.weight.qat:
        first = f', first {trained[0]}' if trained else ''
        raise ValueError(
            f'the weights of this checkpoint were trained on their grid (weight.qat=True){first}: '
            'their bits are fixed; remove --bits'
        )
    for quantizer in changed.values():
        quantizer.set_spec(dataclasses.replace(quantizer.spec, num_bits=bits))


def _require_stage1(model: Any) -> None:
    found = quantizers(model, 'weight').items()
    done = [n for n, q in found if q.is_calibrated and not q.spec.learn_scale]
    if done:
        raise ValueError(
            f'{done[0]}: the weights are already quantized; load the stage-1 checkpoint, '
            'gplq_stage1.pth'
        )


@contextmanager
def _as_float_checkpoint(model: Any, source: Mapping[str, Any]) -> Iterator[None]:
    """Context manager: a converted model has the weights of its FP32 checkpoint, read here."""
    with as_float_model(model, read_float(source)):
        yield


def _more_images(model: Any, images: CalibrationSet, number: int) -> Callable[[], None]:
    """A pass over up to so many training images, in batches of the same size."""
    found = min(number, len(images.dataset))
    size = len(images.batches[0])
    return images.sample(found, size, found, 'stage2').run_pass(model, 'stage 2, more images')


def _packed_format(runner: TrainingRunner) -> str | None:
    """``GPLQHook(deploy=...)`` of the run."""
    return next((h.deploy for h in runner.hooks if hasattr(h, 'deploy')), None)


def _source(runner: TrainingRunner) -> Mapping[str, Any]:
    """Identity of the FP32 checkpoint, as the hook read it from the stage-1 checkpoint."""
    return next((h.source for h in runner.hooks if hasattr(h, 'source')), {})
