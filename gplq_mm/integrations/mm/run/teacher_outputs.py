# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Check whether the teacher's outputs can be cached on disk, and attach the cache."""

from collections.abc import Mapping
from typing import Any

import torch
from mmengine.logging import print_log
from torch import nn

from ....distillation.mimicking import Mimicking
from ....distillation.teacher_cache import TeacherCache
from ....stream.stored_file import remove_unfinished
from ..runner_types import TrainingRunner

_SAMPLES, _LOADS = 3, 6
DAY = 86400.0
"""Seconds after which a temporary file is no longer that of a running process elsewhere."""


def check_teacher_cache(model: Any, runner: TrainingRunner) -> None:
    """Refuse ``engine.teacher_cache`` if the images differ between epochs.

    Checked by loading three images six times each.

    Raises:
        ValueError: If the training pipeline or the preprocessor is random, or the model has no
            teacher.
    """
    if model.gplq.engine.teacher_cache is None:
        return
    if not isinstance(model, Mimicking):
        raise ValueError(
            'engine.teacher_cache is set, but the recipe has no teacher (mimic=None); remove it'
        )
    if getattr(model.data_preprocessor, 'batch_augments', None) is not None:
        raise ValueError(
            "engine.teacher_cache: data_preprocessor's batch_augments mix images at random, so no "
            'image comes twice; remove them or the cache'
        )
    dataset: Any = runner.train_loop.dataloader.dataset
    for index in range(min(_SAMPLES, len(dataset))):
        images = [dataset[index]['inputs'] for _ in range(_LOADS)]
        if not all(image.shape == images[0].shape for image in images[1:]) or not all(
            torch.equal(image, images[0]) for image in images[1:]
        ):
            raise ValueError(
                f'engine.teacher_cache: the training pipeline changes images at random '
                f'({_names(dataset)}), so the teacher sees no image twice; take the random '
                'transforms out of train_pipeline, or remove the cache'
            )


def attach_teacher_cache(model: nn.Module, source: Mapping[str, Any]) -> None:
    """Give a mimicking model the cache that its ``engine`` config names.

    Args:
        model: Model with its teacher attached.
        source: Identity of the FP32 checkpoint.
    """
    if not isinstance(model, Mimicking) or model.gplq.engine.teacher_cache is None:
        return
    folder = model.gplq.engine.teacher_cache
    remove_unfinished(folder, older_than=DAY)
    model.attach_cache(TeacherCache(folder, str(source.get('sha256')), model.needs_features))
    print_log(f'mimicking: outputs of the teacher are cached in {folder}', logger='current')


def _names(dataset: Any) -> str:
    """Transforms of a dataset, or of the one it wraps."""
    while not hasattr(dataset, 'pipeline') and hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    transforms = getattr(getattr(dataset, 'pipeline', None), 'transforms', [])
    return ', '.join(type(t).__name__ for t in transforms)
