# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Read a checkpoint without running what is pickled in it; write one all at once or not at all."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from mmengine.logging import HistoryBuffer


def _history_statistic(owner: type, name: str) -> Callable:
    """Stand in for the ``getattr`` by which a pickled ``HistoryBuffer`` names its statistics."""
    if owner is not HistoryBuffer or name not in _STATISTICS:
        raise ValueError(f'the file asks for {name!r} of {owner!r}')
    return _STATISTICS[name]


_STATISTICS = HistoryBuffer()._statistics_methods
_RECONSTRUCT = np.ndarray((0,)).__reduce__()[0]
_SCALAR = np.float64(0).__reduce__()[0]
_DTYPES = ('bool', 'int32', 'int64', 'float32', 'float64')
# What MMEngine's runner puts into `message_hub`: for `torch.serialization.safe_globals`.
# Files written with NumPy 1 say `numpy.core`, with NumPy 2 `numpy._core`.
MMENGINE_GLOBALS = [
    HistoryBuffer,
    np.ndarray,
    np.dtype,
    *(type(np.dtype(name)) for name in _DTYPES),
    *((_RECONSTRUCT, f'numpy.{core}.multiarray._reconstruct') for core in ('core', '_core')),
    *((_SCALAR, f'numpy.{core}.multiarray.scalar') for core in ('core', '_core')),
    *((_history_statistic, f'{builtins}.getattr') for builtins in ('builtins', '__builtin__')),
]


def read_checkpoint(path: str | Path) -> dict:
    """Load a checkpoint to the CPU with ``weights_only=True``.

    Args:
        path: File that MMEngine's runner, or one of our tools, wrote.

    Returns:
        What the file holds, with its weights under ``state_dict``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, is no checkpoint, or needs code to be run.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'no checkpoint at {path.absolute()}')
    try:
        with torch.serialization.safe_globals(MMENGINE_GLOBALS):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # a damaged pickle raises anything: KeyError, EOFError, ...
        raise ValueError(
            f'{path.absolute()} cannot be read as a checkpoint: {_reason(error)}'
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f'{path.absolute()} holds a {type(checkpoint).__name__}, no checkpoint; '
            f"write it with torch.save(dict(state_dict=model.state_dict()), '{path.name}')"
        )
    if 'state_dict' not in checkpoint:
        checkpoint = dict(state_dict=checkpoint)
    return checkpoint


def write_checkpoint(checkpoint: dict, path: str | Path) -> None:
    """Save a checkpoint so that ``path`` never holds half a file.

    Args:
        checkpoint: Tensors and plain Python values, so that ``weights_only=True`` reads it.
        path: Where it goes; missing folders are made, a file there is replaced.

    Raises:
        OSError: If the file cannot be written; what stood there stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        with unfinished.open('wb') as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _reason(error: Exception) -> str:
    """The part of torch's long message that names the cause, without its unsafe advice."""
    cause = re.search(r'WeightsUnpickler error: *(.*?)(?: Please use|\n|$)', str(error))
    text = cause[1] if cause else next(iter(str(error).splitlines()), '')
    return f'{type(error).__name__}: {text or "no reason given"}'
