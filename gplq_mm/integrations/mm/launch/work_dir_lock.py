# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""One run at a time writes to a work dir."""

import fcntl
import os
import platform
from pathlib import Path
from typing import IO

from mmengine.dist import broadcast_object_list, is_main_process

from .errors import ConfigError

LOCK_NAME = '.gplq_lock'


def lock_work_dir(work_dir: str | Path) -> IO[str] | None:
    """Claim a work dir for this process, until the returned file is closed or the process ends.

    The lock is the operating system's: a killed process leaves none, and its dataloader workers do
    not inherit it. The file's text says who holds it.

    Args:
        work_dir: Folder of a run; it is created.

    Returns:
        The open file; None on other ranks than the main process, and where the file system has no
        locks.

    Raises:
        ConfigError: On all ranks, if another process holds the lock.
    """
    file, refusal = _lock(Path(work_dir)) if is_main_process() else (None, None)
    answer = [refusal]
    broadcast_object_list(answer)
    if answer[0] is not None:
        raise ConfigError(answer[0])
    return file


def _lock(work_dir: Path) -> tuple[IO[str] | None, str | None]:
    """The locked file, or why it cannot be had."""
    work_dir.mkdir(parents=True, exist_ok=True)
    file = (work_dir / LOCK_NAME).open('a+', encoding='utf-8')
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        owner = file.read().strip() or 'another process'
        file.close()
        return None, (
            f'{work_dir} is in use: {owner} is running in it; wait until it ends, or give another '
            '--work-dir'
        )
    except OSError:  # a file system without locks
        file.close()
        return None, None
    file.truncate(0)
    file.write(f'process {os.getpid()} on {platform.node()}\n')
    file.flush()
    return file, None
