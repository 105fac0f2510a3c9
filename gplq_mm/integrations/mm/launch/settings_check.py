# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Settings of a config that MMEngine would refuse late, without naming the key, or not at all."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import GPLQ_TYPES
from .errors import ConfigError

SPLITS = ('train', 'val', 'test')
HOOK_TYPES = ('gplq_mm.GPLQHook', 'GPLQHook')
_GPLQ_HOOK = "custom_hooks=[dict(type='gplq_mm.GPLQHook')]"


@dataclass(frozen=True)
class Number:
    """Allowed values of a setting.

    Attributes:
        lowest: Smallest value.
        integer: Whether it has no fraction.
        highest: Largest value.
        optional: Whether None is allowed.
    """

    lowest: int
    integer: bool = True
    highest: float = math.inf
    optional: bool = False

    def holds(self, value: Any) -> bool:
        """Whether a value is allowed."""
        if value is None:
            return self.optional
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        whole = not self.integer or float(value).is_integer()
        return whole and self.lowest <= value <= self.highest

    def describe(self) -> str:
        """What to write, for the error."""
        kind = 'an integer' if self.integer else 'a number'
        to = '' if math.isinf(self.highest) else f' to {self.highest:.0f}'
        return f'{kind} from {self.lowest}{to}{" or None" if self.optional else ""}'


NUMBERS = {
    'randomness.seed': Number(0, highest=2**32 - 1, optional=True),
    **{f'{split}_dataloader.batch_size': Number(1) for split in SPLITS},
    **{f'{split}_dataloader.num_workers': Number(0) for split in SPLITS},
    'train_cfg.max_epochs': Number(1),
    'train_cfg.max_iters': Number(1),
    'train_cfg.val_interval': Number(1),
    'optim_wrapper.optimizer.lr': Number(0, integer=False),
    'optim_wrapper.accumulative_counts': Number(1),
}
"""Dotted names of settings, checked where a config has them."""
DICTS = (
    *('model', 'randomness', 'train_cfg', 'optim_wrapper', 'default_hooks', 'env_cfg'),
    *(f'{split}_dataloader' for split in SPLITS),
)
"""Settings that are dicts where a config has them."""


def is_gplq(cfg: Mapping[str, Any]) -> bool:
    """Whether a config's model is built by ``gplq_mm.GPLQ``, also inside a TTA model."""
    model = cfg.get('model') or {}
    model = model.get('module') or model
    return model.get('type') in GPLQ_TYPES


def check_settings(cfg: Mapping[str, Any], path: str, splits: Sequence[str]) -> None:
    """Refuse settings that no run can have, before anything is built.

    Args:
        cfg: The run's config.
        path: The config's file, for the message.
        splits: Which of ``train``, ``val`` and ``test`` the tool runs.

    Raises:
        ConfigError: For the first such setting; the message names its key and what to write.
    """
    if cfg.get('model') is None:
        raise ConfigError(f'{path} has no model; write model=dict(type=...), or a _base_ with one')
    for key in DICTS:
        if cfg.get(key) is not None and not isinstance(cfg[key], Mapping):
            raise ConfigError(f'{key}={cfg[key]!r} in {path}: write a dict')
    _check_hooks(cfg, path)
    for split in SPLITS:
        _check_split(cfg, path, split, required=split in splits)
    for key, number in NUMBERS.items():
        _check_number(cfg, path, key, number)


def require_gplq_hook(cfg: Mapping[str, Any], path: str) -> None:
    """Refuse to train a GPLQ config without its hook, which calibrates and runs stage 2.

    Raises:
        ConfigError: If ``custom_hooks`` does not name it.
    """
    if is_gplq(cfg) and not has_gplq_hook(cfg):
        raise ConfigError(
            f'{path} has a GPLQ model and no GPLQHook, which calibrates, adds the teacher and runs '
            f'stage 2; write {_GPLQ_HOOK}'
        )


def has_gplq_hook(cfg: Mapping[str, Any]) -> bool:
    """Whether ``custom_hooks`` has the GPLQ hook, as a dict or built."""
    kinds = (
        hook.get('type') if isinstance(hook, Mapping) else type(hook)
        for hook in cfg.get('custom_hooks') or []
    )
    return any(getattr(kind, '__name__', kind) in HOOK_TYPES for kind in kinds)


def make_work_dir(work_dir: str) -> None:
    """Create the folder of a run, and try to write to it.

    Raises:
        ConfigError: If that fails: the disk is full or read-only, or a file has its name.
    """
    try:
        Path(work_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=work_dir) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        raise ConfigError(
            f'nothing can be written to the work dir {Path(work_dir).absolute()}: '
            f'{error.strerror or error}; give another one with --work-dir DIR'
        ) from error


def _check_hooks(cfg: Mapping[str, Any], path: str) -> None:
    hooks = cfg.get('custom_hooks')
    plain = isinstance(hooks, str | Mapping) or not isinstance(hooks, Sequence)
    if hooks is not None and plain:
        raise ConfigError(f'custom_hooks={hooks!r} in {path}: write a list such as {_GPLQ_HOOK}')


def _check_split(cfg: Mapping[str, Any], path: str, split: str, required: bool) -> None:
    """MMEngine builds a loop from three settings, all of them or none."""
    partner = 'optim_wrapper' if split == 'train' else f'{split}_evaluator'
    keys = (f'{split}_dataloader', f'{split}_cfg', partner)
    missing = [key for key in keys if cfg.get(key) is None]
    if missing and (required or len(missing) < len(keys)):
        there = [key for key in keys if key not in missing]
        also = f', as {" and ".join(there)} need it' if there else ''
        raise ConfigError(f'{path} has no {" and no ".join(missing)}: write it{also}')


def _check_number(cfg: Mapping[str, Any], path: str, key: str, number: Number) -> None:
    first, *sections, last = key.split('.')
    found: Any = cfg.get(first)  # MMEngine's Config is no Mapping
    for section in sections:
        found = found.get(section) if isinstance(found, Mapping) else None
    if isinstance(found, Mapping) and last in found and not number.holds(found[last]):
        raise ConfigError(f'{key}={found[last]!r} in {path}: write {number.describe()}')
