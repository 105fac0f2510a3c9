# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""One GPLQ run: the steps that the hook calls, and the files that they write to the work dir."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import barrier, is_main_process
from mmengine.logging import print_log

from ...analysis import model_bytes, read_json, write_json
from ...analysis.scale_changes import scale_changes
from ...analysis.start_error import as_float_model, float_state_of
from ...calibration.activation_ranges import (
    calibrate_activations,
    calibrate_trained_weights,
    is_calibrated,
    observed_passes,
)
from ...calibration.layerwise import calibrate_layerwise, layerwise_images
from ...convert import quantizers, set_quantization
from ...pages.run_files import examples_path
from ...recipe import Recipe
from ...stream.stored_file import remove_unfinished
from .checkpoints.checkpoint_io import read_checkpoint
from .checkpoints.run_checkpoint import (
    CALIBRATED_NAME,
    FINAL_NAME,
    STAGE1_NAME,
    file_sha256,
    record,
    save_resumable,
    save_snapshot,
    snapshot,
    unwrap,
)
from .data.calibration_data import CalibrationSet
from .predictions.prediction_log import ClassAccuracy, PredictionLog, all_or_log, classes_of
from .run.deployed_figures import report_deployed
from .run.evaluate import evaluate, numbers_of, validation_key
from .run.progress import ProgressLog
from .run.resources import StageMeter
from .run.run_report import RunReport
from .run.start_check import check_start
from .run.teacher import attach_teacher, check_mimic_images, pca_images
from .run.teacher_outputs import attach_teacher_cache, check_teacher_cache
from .run.weight_stage import apply_stage2, measure_final
from .runner_types import TrainingRunner

SOURCE_NAME = 'gplq_source.json'


class GPLQSession:
    """State of a run between the hook's calls.

    Args:
        runner: TrainingRunner in training, loops built, weights not loaded yet.
        resumed: Whether the runner resumes.

    Raises:
        ValueError: If the calibration images cannot be drawn.
    """

    def __init__(self, runner: TrainingRunner, resumed: bool) -> None:
        self.runner = runner
        self.model = unwrap(runner.model)
        self.calibration = CalibrationSet.of_recipe(runner.cfg, self.recipe)
        check_mimic_images(self.model, self.calibration)
        check_teacher_cache(self.model, runner)
        self.report = RunReport(runner.work_dir, resume=resumed)
        self.meter: StageMeter | None = None
        self._watch_stage1()
        self.trained_seconds = 0.0

    @property
    def recipe(self) -> Recipe:
        """The model's recipe, with the rules that its gate added."""
        recipe: Recipe = self.model.gplq.recipe
        return recipe

    def prepare(
        self,
        source: Mapping[str, Any],
        scores: tuple[bool, bool],
        mimic: Mapping[str, Any] | None = None,
    ) -> None:
        """Calibration, teacher and FP32 score; a resumed run skips finished steps.

        Args:
            source: Identity of the FP32 checkpoint.
            scores: Whether to score the FP32 model, and the calibrated one.
            mimic: State of mimicking in the checkpoint that is resumed from.
        """
        coverage = self.model.gplq.coverage.as_tree_dict()
        engine = self.model.gplq.engine.description
        validation = validation_key(self.runner.cfg)
        self.report.describe(
            self.recipe.as_dict(),
            coverage,
            self.runner.seed,
            engine,
            validation,
            self.runner.timestamp,
        )
        fresh = not is_calibrated(self.model)
        float_state = None
        if fresh:
            float_state = float_state_of(self.model)
            self._calibrate()  # first: it is short, and errors of the model show up here
            check_start(
                self.runner,
                self.calibration,
                float_state,
                self.report,
                self._calibrate,
            )
        attach_teacher(self.model, source, float_state, pca_images(self.calibration), mimic)
        attach_teacher_cache(self.model, source)
        if float_state is not None:
            self._score_fp32(scores[0], float_state)
            if scores[1] and self.runner.val_loop is not None:
                metrics = evaluate(self.runner, self.runner.val_loop, 'calibrated')
                self.report.update('calibration', metrics=metrics)
            save_resumable(self.runner, CALIBRATED_NAME)

    def start_epoch(self) -> None:
        """Start measuring an epoch of stage 1."""
        self.meter = StageMeter().__enter__()
        optimizer = getattr(self.runner.optim_wrapper, 'optimizer', None)
        if optimizer is not None:
            self.meter.sample_after(optimizer.register_step_post_hook)

    def end_epoch(self) -> None:
        """Add an epoch's time and memory to the report."""
        assert self.meter is not None
        self.meter.__exit__(None, None, None)
        self.trained_seconds += self.meter.seconds
        peak = self.meter.peak_memory_bytes
        self.meter = None
        known = self.report.data.get('stage1', {})
        self.report.update(
            'stage1',
            seconds=self.trained_seconds,
            peak_memory_bytes=max(known.get('peak_memory_bytes', 0), peak),
        )

    def stage1_seconds(self) -> float:
        """Seconds of training so far, those of killed processes up to their checkpoint included."""
        return self.trained_seconds + (self.meter.elapsed() if self.meter else 0.0)

    def record_stage1(self, metrics: Mapping[str, float]) -> None:
        """Keep the validation metrics of stage 1 under their own names."""
        numbers, classes = numbers_of(metrics), self.by_class.as_dict()
        self.report.update('stage1', metrics=numbers, iterations=self.runner.iter)
        if classes:
            self.report.update('stage1', per_class=classes)
        self._watch_stage1()

    def _watch_stage1(self) -> None:
        """Begin to count a validation of stage 1 by class."""
        loop = self.runner.val_loop
        self.by_class = ClassAccuracy(classes_of(loop))
        self.watch = all_or_log([self.by_class.watch])

    def finish(self, source: Mapping[str, Any], packed: str | None = None) -> None:
        """Stage-1 checkpoint, stage 2, final score, final checkpoint, packed file, table.

        Args:
            source: Identity of the FP32 checkpoint.
            packed: Format of the packed file, None for none.
        """
        loop = self.runner.val_loop
        dataset = loop.dataloader.dataset if loop else self.runner.train_dataloader.dataset
        stage1 = snapshot(self.runner, dataset, through_hooks=True)
        stage1['gplq'] = record(self.model, 'stage1', source)
        save_snapshot(stage1, os.path.join(self.runner.work_dir, STAGE1_NAME))
        self.model.load_state_dict(stage1['state_dict'])
        # a run killed during its last validation has the metrics of an earlier epoch
        if loop is not None and self.report.stage1_iterations() != self.runner.iter:
            self._watch_stage1()
            self.record_stage1(evaluate(self.runner, loop, 'stage 1', [self.watch]))
        self.report.count_macs(self.model, next(iter(self.calibration)))
        apply_stage2(self.runner, self.recipe, self.calibration, self.report)
        measure_final(self.model, self.calibration, source, self.report)
        final = snapshot(self.runner, dataset, through_hooks=False)
        final['gplq'] = record(self.model, 'stage2', source)
        path = os.path.join(self.runner.work_dir, FINAL_NAME)
        save_snapshot(final, path)
        self._report_scales(stage1['state_dict'])
        report_deployed(self.model, final, path, packed, self.calibration, self.report)
        self.report.log_table()

    def _report_scales(self, after: Mapping[str, torch.Tensor]) -> None:
        """Record the scales that stage 1 moved most since calibration."""
        path = Path(self.runner.work_dir) / CALIBRATED_NAME
        if is_main_process() and path.is_file():
            before = read_checkpoint(path)['state_dict']
            self.report.update('stage1', scales=scale_changes(before, after))

    def _score_fp32(self, scored: bool, float_state: Mapping[str, torch.Tensor]) -> None:
        metrics: dict[str, float] = {}
        log, loop = PredictionLog(), self.runner.val_loop
        by_class = ClassAccuracy(classes_of(loop))
        with as_float_model(self.model, float_state):
            self.report.update('fp32', model_bytes=model_bytes(self.model))
            with StageMeter() as meter:
                meter.sample_after(self.model.register_forward_hook)
                if scored and loop is not None:
                    watchers = log.watch, by_class.watch
                    metrics = evaluate(self.runner, loop, 'FP32', watchers)
        if is_main_process():
            log.write(self.runner.work_dir)
            examples_path(self.report.path).unlink(missing_ok=True)  # of an earlier run
        self.report.update(
            'fp32',
            metrics=metrics,
            per_class=by_class.as_dict(),
            seconds=meter.seconds,
            peak_memory_bytes=meter.peak_memory_bytes,
        )

    def _calibrate(self) -> None:
        self.calibration.log()
        require_runs(self.model, next(iter(self.calibration)))
        with StageMeter() as meter:
            passes = observed_passes(self.model)
            run_pass = self.calibration.run_pass(self.model, 'calibration', passes)
            number = calibrate_activations(self.model, run_pass)
            settings = self.recipe.calibration
            if settings.migrate or settings.compensate:
                self._calibrate_layerwise()
            number += calibrate_trained_weights(self.model)
        self.report.update('calibration', seconds=meter.seconds, quantizers=number)
        print_log(f'calibrated {number} quantizers in {meter.seconds:.1f} s', logger='current')

    def _calibrate_layerwise(self) -> None:
        """Choose input scales and fit float weights by the error of each layer's output."""
        settings, training = self.recipe.calibration, self.model.training
        number, size = len(self.calibration.indices), len(self.calibration.batches[0])
        most = layerwise_images(size)
        images = self.calibration.sample(min(number, most), size, most, 'calibration')
        result = calibrate_layerwise(
            self.model.eval(),
            images.run_pass(self.model, 'calibration by layer'),
            migrate=settings.migrate,
            compensate_weights=settings.compensate,
            progress=ProgressLog('calibration by layer'),
        )
        self.model.train(training)
        for line in result.summary():
            print_log(line, logger='current')
        self.report.update('calibration', layers=result.as_dict())


def require_runs(model: Any, batch: Any) -> None:
    """Refuse a float model that cannot run, before long work.

    Args:
        model: Converted model; its quantizers are off during the check.
        batch: Collated training images.

    Raises:
        ValueError: With the model's own error, and its cause if it is a known one.
    """
    training = model.training
    set_quantization(model, False)
    try:
        with torch.no_grad():
            model.eval().test_step(batch)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f'the float model itself does not run on a training image: {error}{_remedy(model)}'
        ) from error
    finally:
        set_quantization(model, True)
        model.train(training)


def _remedy(model: Any) -> str:
    head = getattr(model, 'head', None)
    if head is None or getattr(model, 'neck', None) is not None:
        return ''
    return (
        f'; {type(model).__name__} has no neck: where {type(head).__name__} expects a pooled '
        "feature, write model=dict(neck=dict(type='GlobalAveragePooling'))"
    )


def log_active_quantizers(model: Any) -> None:
    """Log how many quantizers a test will use."""
    active = {k: sum(q.is_active for q in quantizers(model, k).values()) for k in _KINDS}
    total = {k: len(quantizers(model, k)) for k in _KINDS}
    counts = ', '.join(f'{active[k]}/{total[k]} {k}' for k in _KINDS)
    name = model.gplq.recipe.name
    print_log(f'quantizers active: {counts}; recipe {name}', logger='current')


_KINDS = ('activation', 'weight')


def remember_source(work_dir: str, path: str) -> dict[str, Any]:
    """Write which FP32 checkpoint a run starts from, so that a resume finds it."""
    source: dict[str, Any] = {'path': os.path.abspath(path) if os.path.exists(path) else path}
    source['sha256'] = file_sha256(source['path'])
    if is_main_process():
        write_json(Path(work_dir) / SOURCE_NAME, source)
    barrier()
    return source


def log_next_steps(runner: TrainingRunner) -> None:
    """Log the final checkpoint, and the commands that take it."""
    config, path = runner.cfg.filename or 'CONFIG', os.path.join(runner.work_dir, FINAL_NAME)
    print_log(
        f'quantized model: {path}\n'
        f'  score it:       python tools/test.py {config} {path}\n'
        f'  on integers:    python tools/test.py {config} {path} --engine integer\n'
        f'  export it:      python tools/deploy.py {config} {path} -o model.onnx',
        logger='current',
    )


def remove_leftovers(work_dir: str) -> None:
    """Remove the temporary files of killed runs from a work dir."""
    removed = remove_unfinished(work_dir) if is_main_process() else []
    if removed:
        names = ', '.join(path.name for path in removed)
        print_log(f'removed temporary files of a killed run: {names}', logger='current')


def recall_source(work_dir: str) -> dict[str, Any]:
    """The entry that ``remember_source`` wrote, or an empty dict."""
    return read_json(Path(work_dir) / SOURCE_NAME)
