# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The text of a GPLQ config that builds on a project's float config."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Collection
from inspect import signature
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope

from ..integrations.mm.launch.errors import ConfigError
from ..recipe import as_recipe
from ..recipe.auto_settings import AUTO, MEASURED_ITERATIONS

HOOK = "dict(type='gplq_mm.GPLQHook')"
MOST_EPOCHS = 20
"""Largest number of epochs, for a classifier with very few images; ten were measured
(``docs/accuracy_trials.md``)."""
PLAIN_LOOP = 'EpochBasedTrainLoop'
MOST_BETWEEN = 1000
"""Largest number of iterations between two checkpoints, as in ``configs/gplq``."""


def config_text(cfg: Config, base: str, checkpoint: str, recipe: str, out: Path) -> str:
    """Text of the GPLQ config.

    Args:
        cfg: The float config, read.
        base: Path of the float config.
        checkpoint: Trained float model, as given by the user.
        recipe: Name of a preset.
        out: Path of the new config.
    """
    lines = [
        f'# GPLQ {recipe} of {Path(base).name}: written by python -m gplq_mm init',
        f'_base_ = {_relative(base, out)!r}',
        f'load_from = {checkpoint!r}',
        'resume = False',
        f"model = dict(type='gplq_mm.GPLQ', float_type={cfg.model.type!r}, "
        f'recipe=dict(base={recipe!r}))',
        *_label_lines(cfg),
        *_hooks_lines(cfg),
        *_schedule_lines(cfg, recipe),
        "optim_wrapper = dict(_delete_=True, constructor='gplq_mm.GPLQOptimWrapperConstructor')",
    ]
    if cfg.get('work_dir'):  # the project's work dir has the float model's checkpoints
        lines.append(f'work_dir = {str(Path("work_dirs") / out.stem)!r}')
    return '\n'.join(lines) + '\n'


def _hooks_lines(cfg: Config) -> list[str]:
    """`custom_hooks`: the project's own hooks without its EMA (a list replaces the base's list)."""
    types = [str(hook.get('type')) for hook in cfg.get('custom_hooks') or []]
    if any('EMAHook' in kind for kind in types):
        kept = "*(h for h in _base_.custom_hooks if 'EMAHook' not in str(h['type']))"
        return [
            "# no EMAHook: over one epoch an average as slow as the base's stays near the start",
            f'custom_hooks = [{kept}, {HOOK}]',
        ]
    return [f'custom_hooks = [{"*_base_.custom_hooks, " if types else ""}{HOOK}]']


def _label_lines(cfg: Config) -> list[str]:
    """Lines for a classifier: no Mixup or CutMix, and learning rates for 128 images."""
    lines = []
    if 'augments' in (cfg.model.get('train_cfg') or {}):
        lines.append("model['train_cfg'] = None  # no Mixup: scales are learned on unmixed images")
    if is_classifier(cfg) and cfg.get('auto_scale_lr'):
        lines.append("auto_scale_lr = dict(base_batch_size=128)  # of the recipe's learning rates")
    return lines


def _schedule_lines(cfg: Config, recipe: str) -> list[str]:
    """Stage 1 with a cosine schedule, in the project's unit: epochs or iterations.

    The cosine ends with the training, so a longer run changes one number. Checkpoints are saved
    within an epoch too, so that a killed run loses a tenth of stage 1 at most.
    """
    repeats = is_classifier(cfg) and as_recipe(recipe).optim.lr_iterations == AUTO
    if not is_iteration_based(cfg):
        one, unread = length_of_epoch(cfg)
        epochs, why = epochs_of_stage1(one, unread) if repeats else (1, '')
        return [
            *_epoch_lines(cfg, epochs, why, one and one * epochs),
            "param_scheduler = [dict(type='CosineAnnealingLR', convert_to_iter_based=True)]",
        ]
    one = iterations_of_one_epoch(cfg)
    iters = max(one, min(MEASURED_ITERATIONS, MOST_EPOCHS * one)) if repeats else one
    why = 'one epoch' if iters == one else f'one epoch has {one}'
    return [
        f'train_cfg = dict(max_iters={iters}, val_interval={iters})  # {why}',
        *_checkpoint_lines(cfg, iters),
        "param_scheduler = [dict(type='CosineAnnealingLR', by_epoch=False)]",
    ]


def _epoch_lines(cfg: Config, epochs: int, why: str, iterations: int | None) -> list[str]:
    """`train_cfg` and the checkpoint hook; a loop of the project's own stays as it is."""
    numbers, comment = f'max_epochs={epochs}, val_interval={epochs}', why and f'  # {why}'
    kind = cfg.train_cfg.get('type', PLAIN_LOOP)
    if str(getattr(kind, '__name__', kind)).rpartition('.')[2] != PLAIN_LOOP:
        return [f'train_cfg = dict({numbers}){comment}']
    return [
        f"train_cfg = dict(_delete_=True, type='gplq_mm.ResumableEpochLoop', {numbers}){comment}",
        *_checkpoint_lines(cfg, iterations),
    ]


def _checkpoint_lines(cfg: Config, iterations: int | None) -> list[str]:
    """The checkpoint hook: ten times in a training, and every 1000 iterations of a long one."""
    given = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    kind = given.get('type', 'CheckpointHook')
    every = min(math.ceil(iterations / 10), MOST_BETWEEN) if iterations else MOST_BETWEEN
    return [
        'default_hooks = dict(checkpoint=dict(',
        f'    type={getattr(kind, "__name__", kind)!r}, by_epoch=False, interval={every}, '
        'max_keep_ckpts=2))',
    ]


def is_classifier(cfg: Config) -> bool:
    """Whether a config is mmpretrain's."""
    return cfg.get('default_scope') == 'mmpretrain'


def length_of_epoch(cfg: Config) -> tuple[int | None, str]:
    """Iterations of an epoch; None, and why, if the training set cannot be read."""
    try:
        return iterations_of_one_epoch(cfg, download=False), ''
    except Exception as error:  # a project's data set may raise anything: init needs no data
        return None, type(error.__cause__ or error).__name__


def epochs_of_stage1(iterations: int | None, unread: str) -> tuple[int, str]:
    """Number of epochs of a classifier, with the reason: one, or enough for a few hundred steps.

    A detector has thousands of tokens per image; a classifier with few images has to see them
    repeatedly (measured: ``docs/accuracy_trials.md``).

    Args:
        iterations: Length of an epoch; None if it is not known.
        unread: Why it is not known.
    """
    if iterations is None:
        few = f'more if an epoch has far fewer than {MEASURED_ITERATIONS} iterations'
        return 1, f'training set not read ({unread}): {few}'
    epochs = min(max(1, round(MEASURED_ITERATIONS / iterations)), MOST_EPOCHS)
    return epochs, f'of {iterations} iterations' if epochs > 1 else ''


def is_iteration_based(cfg: Config) -> bool:
    """Whether a config trains for iterations, not epochs."""
    loop: Any = cfg.get('train_cfg') or {}
    if 'by_epoch' in loop:
        return not loop['by_epoch']
    return 'max_iters' in loop


def iterations_of_one_epoch(cfg: Config, download: bool = True) -> int:
    """Training images over batch size, rounded up; needs the data.

    Args:
        cfg: The float config.
        download: Whether a data set may download missing files.

    Raises:
        ConfigError: If the training set cannot be read.
    """
    given = copy.copy(cfg.train_dataloader.dataset)
    try:
        with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
            if not download and 'download' in _arguments(given['type']):
                given['download'] = False
            dataset = DATASETS.build(given)
    except FileNotFoundError as error:
        raise ConfigError(
            f'the config counts iterations; the length of an epoch is that of the training set, '
            f'which cannot be read: {error}'
        ) from error
    batch = cfg.train_dataloader.get('batch_size') or cfg.train_dataloader.batch_sampler.batch_size
    return math.ceil(len(dataset) / batch)


def _arguments(kind: Any) -> Collection[str]:
    """Names of a data set's arguments; empty for an unknown type."""
    if isinstance(kind, str):
        with DATASETS.switch_scope_and_registry(None) as registry:
            kind = registry.get(kind)
    return signature(kind).parameters if kind else ()


def _relative(base: str, out: Path) -> str:
    return base if '::' in base else Path(os.path.relpath(base, out.parent)).as_posix()
