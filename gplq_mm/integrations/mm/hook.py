# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""GPLQHook: *when* calibration, stage 1, stage 2 and the report happen."""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import IO, Any

from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.runner import Runner

from ...compat.mmengine import built_loops, is_resumed, load_path, start_from
from ...deployment.packed_file import unpack_checkpoint_
from ...registry import HOOKS
from .checkpoints.former_recipe import take_former_form_
from .checkpoints.kept_checkpoints import keep_while_writing_, remove_replaced
from .checkpoints.resume import resumable_checkpoint
from .checkpoints.run_checkpoint import (
    check_quantized,
    is_quantized_checkpoint,
    load_float_,
    record,
    unwrap,
)
from .checkpoints.same_training import require_same_training
from .data.class_check import check_classes
from .launch.cpu_memory import keep_freed_memory
from .launch.preflight import check_float_checkpoint, downloaded
from .launch.work_dir_lock import lock_work_dir
from .optim import shared_lr_warning, shorten_lr_, slow_average_warning
from .run.deployed_figures import check_format
from .run.interruption import SaveOnSignal
from .run.teacher import mimic_state
from .seeding import RandomState, random_state, seed_epoch, set_random_state
from .session import (
    GPLQSession,
    log_active_quantizers,
    log_next_steps,
    recall_source,
    remember_source,
    remove_leftovers,
)


@HOOKS.register_module()
class GPLQHook(Hook):
    """Run GPLQ around the ordinary training loop.

    Before training: calibration, FP32 score. Training is stage 1. After training:
    stage 2, final score, report, ``gplq_final.pth``, ``gplq_packed.pth``. Metrics keep their
    own names; MMEngine's validation, ``save_best`` and checkpoints work as usual.

    Args:
        evaluate_fp32: Score the FP32 model first (the report's first column).
        evaluate_calibrated: Score the calibrated model too, before any training.
        deploy: Format of the packed file that a run ends with, ``pth`` or ``safetensors``; the
            report then has its size, and the latency of FP32 and of the integers on the CPU. None
            writes and measures nothing.

    Raises:
        ValueError: If ``deploy`` is no such format.
    """

    priority = 'LOW'  # after the EMA hook, before the checkpoint hook

    def __init__(
        self,
        evaluate_fp32: bool = True,
        evaluate_calibrated: bool = False,
        deploy: str | None = 'pth',
    ) -> None:
        check_format(deploy)
        self.evaluate_fp32 = evaluate_fp32
        self.deploy = deploy
        self.evaluate_calibrated = evaluate_calibrated
        self.session: GPLQSession | None = None
        self.source: dict[str, Any] = {}
        self.stage = 'calibrated'
        self.random_state: RandomState | None = None
        self.mimic: dict[str, Any] = {}
        self.single: list[CheckpointHook] = []
        self.lock: IO[str] | None = None
        self.trained_seconds = 0.0

    def before_run(self, runner: Runner) -> None:
        """Check config, checkpoint and data before long work.

        Raises:
            ValueError: If there is no FP32 checkpoint, calibration cannot work, or another run
                writes to the work dir.
        """
        unwrap(runner.model)
        keep_freed_memory()
        datasets = {name: loop.dataloader.dataset for name, loop in built_loops(runner).items()}
        check_classes(unwrap(runner.model), datasets)
        if 'train' not in datasets:
            return
        self.lock = lock_work_dir(runner.work_dir)
        remove_leftovers(runner.work_dir)
        runner.register_hook(SaveOnSignal())
        self._choose_weights(runner)
        for warning in (
            shared_lr_warning(runner.optim_wrapper, unwrap(runner.model)),
            slow_average_warning(runner.hooks, runner.max_iters),
        ):
            if warning:
                print_log(warning, logger='current', level=logging.WARNING)
        shortened = shorten_lr_(runner, unwrap(runner.model))
        if shortened:
            print_log(shortened, logger='current')
        self.single = keep_while_writing_(runner.hooks)
        self.session = GPLQSession(runner, resumed=is_resumed(runner))

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Refuse weights that do not fit the model.

        Raises:
            ValueError: See ``load_float_``, ``check_quantized`` and ``require_same_training``; or
                if a training resumes from a file without training state, or begins with quantized
                weights.
        """
        model = unwrap(runner.model)
        unpack_checkpoint_(checkpoint)
        if self.session is not None:
            _require_right_kind(checkpoint, is_resumed(runner))
        if self.session is None or is_quantized_checkpoint(checkpoint):
            if self.session is None:
                take_former_form_(model, checkpoint)
            check_quantized(model, checkpoint)
            if self.session is not None:
                require_same_training(checkpoint, runner.cfg, model.gplq.recipe.as_dict())
            self.source = dict(checkpoint['gplq']['float_checkpoint'])
            self.random_state = checkpoint['gplq'].get('random_state')
            self.trained_seconds = checkpoint['gplq'].get('stage1_seconds', 0.0)
            self.mimic = checkpoint['gplq'].get('mimic', {})
        else:
            load_float_(model, checkpoint)

    def before_train(self, runner: Runner) -> None:
        """Calibration, FP32 score, teacher."""
        assert self.session is not None
        self.session.trained_seconds = self.trained_seconds
        scores = self.evaluate_fp32, self.evaluate_calibrated
        self.session.prepare(self.source, scores, self.mimic)
        self.stage = 'stage1'

    def before_train_epoch(self, runner: Runner) -> None:
        """Seed the epoch and start the clock."""
        assert self.session is not None
        seed_epoch(runner.train_dataloader, runner.seed, runner.epoch)
        self.session.start_epoch()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Delete a checkpoint that a newer one has replaced."""
        remove_replaced(self.single)

    def after_fast_forward(self, runner: Runner) -> None:
        """Restore the random state of the checkpoint that an epoch is resumed from."""
        if self.random_state is not None:
            set_random_state(self.random_state)

    def after_train_epoch(self, runner: Runner) -> None:
        """Stop the clock."""
        assert self.session is not None
        self.session.end_epoch()

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: dict[str, Any] | None = None,
    ) -> None:
        """Refresh the run's page now and then."""
        assert self.session is not None
        self.session.report.refresh_page()

    def after_val_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Sequence[Any] | None = None,
    ) -> None:
        """Count right and wrong images by class."""
        if self.session is not None and outputs is not None:
            self.session.watch(data_batch, outputs)

    def after_val_epoch(self, runner: Runner, metrics: Mapping[str, float] | None = None) -> None:
        """Keep the latest stage-1 metrics."""
        if self.session is not None and metrics is not None:  # {} if nothing was detected
            self.session.record_stage1(metrics)

    def after_train(self, runner: Runner) -> None:
        """Stage 2, final score, report."""
        assert self.session is not None
        remove_replaced(self.single)
        self.session.finish(self.source, self.deploy)
        log_next_steps(runner)

    def after_run(self, runner: Runner) -> None:
        """Release the work dir."""
        if self.lock is not None:
            self.lock.close()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Store the recipe and the FP32 checkpoint's identity in the checkpoint."""
        checkpoint['gplq'] = record(unwrap(runner.model), self.stage, self.source)
        checkpoint['gplq']['random_state'] = random_state()
        checkpoint['gplq']['mimic'] = mimic_state(unwrap(runner.model))
        if self.session is not None:
            checkpoint['gplq']['stage1_seconds'] = self.session.stage1_seconds()

    def before_test(self, runner: Runner) -> None:
        """Log how many quantizers are active."""
        log_active_quantizers(unwrap(runner.model))

    def _choose_weights(self, runner: Runner) -> None:
        if is_resumed(runner) and load_path(runner) is None:
            latest = resumable_checkpoint(runner.work_dir)
            if latest is not None:
                start_from(runner, latest, resume=True)
                return
            self.source = recall_source(runner.work_dir)
            if self.source:
                print_log(
                    'no checkpoint to resume from; starting from FP32 again', logger='current'
                )
                start_from(runner, self.source['path'], resume=False)
        path = load_path(runner)
        if not path:
            raise ValueError(
                'GPLQ starts from a trained FP32 model, but load_from is not set; write '
                "load_from = 'path/to/fp32.pth' or --cfg-options load_from=path/to/fp32.pth"
            )
        if not is_resumed(runner):
            check_float_checkpoint(downloaded(os.fspath(path)))
            self.source = remember_source(runner.work_dir, path)


def _require_right_kind(checkpoint: Mapping[str, Any], resume: bool) -> None:
    quantized = is_quantized_checkpoint(checkpoint)
    if not resume and quantized:
        raise ValueError(
            'the checkpoint is quantized already, GPLQ starts from a float model; give its FP32 '
            'checkpoint with load_from, or continue with --resume'
        )
    if resume and not (quantized and 'epoch' in checkpoint.get('meta', {})):
        raise ValueError(
            'the checkpoint holds no state of a GPLQ training to resume from; resume from '
            'epoch_*.pth, iter_*.pth or gplq_calibrated.pth'
        )
