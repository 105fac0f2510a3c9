# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Evaluation outside the loops, so that no hook (``save_best``, EMA) reacts to it."""

from collections.abc import Mapping
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.logging import print_log
from mmengine.runner.amp import autocast

from ..checkpoints.run_checkpoint import short_sha256
from ..runner_types import DataLoop, TrainingRunner


@torch.no_grad()
def evaluate(runner: TrainingRunner, loop: DataLoop, title: str) -> dict[str, float]:
    """Score the runner's model as a val or test loop does.

    Args:
        runner: TrainingRunner whose model is scored.
        loop: A built ``ValLoop`` or ``TestLoop``: gives data, metric and fp16.
        title: Name of the model in the log.

    Returns:
        Metrics with the evaluator's own names, as plain numbers.
    """
    model: Any = runner.model
    was_training = model.training
    model.eval()
    total = len(loop.dataloader)
    for index, batch in enumerate(loop.dataloader):
        with autocast(enabled=getattr(loop, 'fp16', False)):
            outputs = model.val_step(batch)
        loop.evaluator.process(data_samples=outputs, data_batch=batch)
        if is_main_process() and (index + 1) % max(total // 4, 1) == 0:
            print_log(f'{title}: evaluated {index + 1}/{total} batches', logger='current')
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
