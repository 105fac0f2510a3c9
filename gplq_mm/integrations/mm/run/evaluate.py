# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Evaluation outside the loops, so that no hook (``save_best``, EMA) reacts to it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.runner.amp import autocast

from ..checkpoints.run_checkpoint import short_sha256
from ..predictions.prediction_log import Watcher, all_or_log
from ..runner_types import DataLoop, TrainingRunner
from .progress import ProgressLog


@torch.no_grad()
def evaluate(
    runner: TrainingRunner, loop: DataLoop, title: str, watchers: Sequence[Watcher] = ()
) -> dict[str, float]:
    """Score the runner's model as a val or test loop does.

    Args:
        runner: TrainingRunner whose model is scored.
        loop: A built ``ValLoop`` or ``TestLoop``: gives data, metric and fp16.
        title: Name of the model in the log.
        watchers: Called with each batch and its data samples.

    Returns:
        Metrics with the evaluator's own names, as plain numbers.
    """
    model: Any = runner.model
    was_training = model.training
    model.eval()
    total, progress = len(loop.dataloader), ProgressLog(f'scoring {title}')
    watch = all_or_log(watchers)
    for index, batch in enumerate(loop.dataloader):
        progress('batches', index, total)
        with autocast(enabled=getattr(loop, 'fp16', False)):
            outputs = model.val_step(batch)
        watch(batch, outputs)
        loop.evaluator.process(data_samples=outputs, data_batch=batch)
    dataset: Any = loop.dataloader.dataset
    metrics = loop.evaluator.evaluate(len(dataset))
    model.train(was_training)
    return numbers_of(metrics)


def validation_key(cfg: Mapping[str, Any]) -> str:
    """Hash of the images and the metric that score a run."""
    loader = cfg.get('val_dataloader') or {}
    return short_sha256((loader.get('dataset'), cfg.get('val_evaluator')))


def numbers_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics that are numbers, NumPy's among them, as plain numbers."""
    return {name: float(value) for name, value in metrics.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True
