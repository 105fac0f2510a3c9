# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Files that a killed process leaves whole: written under a temporary name and renamed.

A temporary name ends with the number of its process, ``.NAME.PID.tmp``, so that the files of a
killed process can be told from those of a running one.
"""

import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

LOGGER = logging.getLogger('gplq_mm')
_UNFINISHED = re.compile(r'\..+\.(\d+)\.tmp')


@contextmanager
def unfinished_file(path: Path) -> Iterator[Path]:
    """Context manager: a temporary name to write, renamed to ``path`` at the end.

    Args:
        path: Output file; missing folders are created. After an error it is as before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        yield unfinished
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def remove_unfinished(folder: str | Path, older_than: float = 0.0) -> list[Path]:
    """Remove the temporary files of killed processes from a folder and those below it.

    Args:
        folder: Any folder; it need not exist.
        older_than: Seconds since a file was last written, for folders that processes of other
            machines write to.

    Returns:
        The removed files; those of running processes are left.
    """
    removed = []
    for path in sorted(Path(folder).rglob('.*.tmp')):
        found = _UNFINISHED.fullmatch(path.name)
        if found and not _is_running(int(found[1])) and _age(path) >= older_than:
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def read_stored(path: Path, device: torch.device | str = 'cpu') -> Any | None:
    """What ``write_stored`` wrote; None if there is no such file, or a damaged one.

    The content can be computed again, so a damaged file is named in the log and removed.

    Args:
        path: The file.
        device: Device of its tensors.
    """
    if not path.is_file():
        return None
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything: KeyError, EOFError, ...
        reason = next(iter(str(error).splitlines()), '')
        kind = type(error).__name__
        LOGGER.warning('%s is damaged and is computed again: %s: %s', path, kind, reason)
        path.unlink(missing_ok=True)
        return None


def write_stored(content: Any, path: Path) -> None:
    """Write tensors and plain values for ``read_stored``.

    Args:
        content: What ``torch.load(weights_only=True)`` reads.
        path: The file; missing folders are created.
    """
    with unfinished_file(path) as unfinished:
        torch.save(content, unfinished)


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:  # renamed meanwhile
        return 0.0


def _is_running(process: int) -> bool:
    with suppress(ProcessLookupError):
        try:
            os.kill(process, 0)
        except PermissionError:
            return True  # of another user
        return True
    return False
