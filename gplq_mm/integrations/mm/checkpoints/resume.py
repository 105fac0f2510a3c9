# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Which checkpoint a killed run resumes from."""

from pathlib import Path

from mmengine.runner import find_latest_checkpoint

from ..launch.preflight import ConfigError, check_checkpoint
from .run_checkpoint import CALIBRATED_NAME

_PATTERNS = ('epoch_*.pth', 'iter_*.pth', CALIBRATED_NAME)


def resumable_checkpoint(work_dir: str | Path) -> str | None:
    """Path of the checkpoint to resume from, or None if there is none.

    MMEngine names it in ``last_checkpoint``, which it rewrites in place: a process
    killed at that moment leaves the file empty. The newest complete checkpoint of the work dir
    is then taken.
    """
    named = find_latest_checkpoint(str(work_dir))
    return named or _newest(Path(work_dir))


def _newest(work_dir: Path) -> str | None:
    found = [path for pattern in _PATTERNS for path in work_dir.glob(pattern)]
    for path in sorted(found, key=lambda p: p.stat().st_mtime_ns, reverse=True):
        try:
            check_checkpoint(path)
        except ConfigError:
            continue  # incomplete: the process was killed while writing it
        return str(path)
    return None
