# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Which checkpoint a killed run resumes from."""

import logging
import os
from pathlib import Path

from mmengine.logging import print_log
from mmengine.runner import find_latest_checkpoint

from ..launch.errors import ConfigError
from ..launch.preflight import check_checkpoint
from .run_checkpoint import CALIBRATED_NAME

_PATTERNS = ('epoch_*.pth', 'iter_*.pth', CALIBRATED_NAME)


def resumable_checkpoint(work_dir: str | Path) -> str | None:
    """Path of the checkpoint to resume from, or None if there is none.

    MMEngine names it in ``last_checkpoint``. A process killed while it writes leaves this file
    empty, or naming a checkpoint that is gone or truncated. The newest complete checkpoint of the
    work dir is then taken, and a warning says so.

    Args:
        work_dir: Folder of the run; it may have been moved.

    Raises:
        ConfigError: If the named checkpoint cannot be read and there is no complete one.
    """
    marker = Path(work_dir, 'last_checkpoint')
    try:
        named = find_latest_checkpoint(str(work_dir))
    except UnicodeDecodeError:
        named = 'no path'
    if not named:
        return _newest(Path(work_dir))
    paths = (named, os.path.join(work_dir, os.path.basename(named)))
    path = next((path for path in paths if os.path.isfile(path)), None)
    lacking = _damage(path) if path else 'which does not exist'
    if path and not lacking:
        return path
    newest = _newest(Path(work_dir))
    if newest is None:
        raise ConfigError(
            f'--resume: {marker} names {named[:200]}, {lacking}; there is no other checkpoint in '
            'this folder: write --resume CHECKPOINT, or start again without --resume'
        )
    print_log(
        f'{marker} names {named[:200]}, {lacking}; resuming from the newest complete checkpoint, '
        f'{newest}',
        logger='current',
        level=logging.WARNING,
    )
    return newest


def _newest(work_dir: Path) -> str | None:
    found = [path for pattern in _PATTERNS for path in work_dir.glob(pattern)]
    newest_first = sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return next((str(path) for path in newest_first if not _damage(path)), None)


def _damage(path: str | Path) -> str:
    """What a killed process left undone in a checkpoint; empty for a complete one."""
    try:
        check_checkpoint(path)
    except ConfigError as error:
        return f'which cannot be read ({error})'
    return ''
