# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Read a checkpoint without running pickled code; write one atomically."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from ....api.checkpoint_file import SAFETENSORS, load_file, write_checkpoint
from ....compat.mmengine import history_statistics, load_files_with_suffix
from ....compat.torch import load_safely_by_default

__all__ = ['fetch', 'read_checkpoint', 'write_checkpoint']


def _history_statistic(owner: type, name: str) -> Callable:
    """Replace the ``getattr`` with which a pickled ``HistoryBuffer`` names its statistics."""
    if owner is not HistoryBuffer or name not in _STATISTICS:
        raise ValueError(f'the file asks for {name!r} of {owner!r}')
    return _STATISTICS[name]


_URL = re.compile(r'^(https?|file)://')
_STATISTICS = history_statistics()
_RECONSTRUCT = np.ndarray((0,)).__reduce__()[0]
_SCALAR = np.float64(0).__reduce__()[0]
_DTYPES = ('bool', 'int32', 'int64', 'float32', 'float64')
# Types that MMEngine's runner stores in `message_hub` and torch's safe default refuses.
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

# Allowed for the whole process, MMEngine's own loader included; the protection stays on.
torch.serialization.add_safe_globals(MMENGINE_GLOBALS)
load_safely_by_default()


def read_checkpoint(path: str | Path) -> dict:
    """Load a checkpoint to the CPU with ``weights_only=True``.

    Args:
        path: File that MMEngine's runner or a tool of this project wrote, or a ``.safetensors``
            file; or its URL.

    Returns:
        Content of the file, with its weights under ``state_dict``; packed ones are unpacked.

    Raises:
        FileNotFoundError: If there is no such file, or the URL cannot be reached.
        ValueError: If the file is truncated, is no checkpoint, or would run code.
    """
    path = fetch(str(path)) if _URL.match(str(path)) else Path(path)
    checkpoint = load_file(path)
    if 'state_dict' not in checkpoint:
        checkpoint = dict(state_dict=checkpoint)
    return checkpoint


def load_from_safetensors(filename: str, map_location: Any = None) -> dict:
    """MMEngine's loader for ``.safetensors`` files, packed or not, of any origin.

    Args:
        filename: Local file.
        map_location: Device of the tensors; the CPU if None.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged.
    """
    checkpoint = read_checkpoint(Path(filename).expanduser())
    if map_location is not None:
        state = checkpoint['state_dict']
        checkpoint['state_dict'] = {k: v.to(map_location) for k, v in state.items()}
    return checkpoint


load_files_with_suffix(SAFETENSORS, load_from_safetensors)


def fetch(url: str) -> Path:
    """Download a checkpoint once, to the folder where MMEngine keeps the models of its zoo.

    Args:
        url: Address beginning with ``https://``, ``http://`` or ``file://``. A name such as
            ``x-1a2b3c4d.pth`` gives the first digits of the file's SHA-256, which are then
                checked.

    Returns:
        The local file.

    Raises:
        FileNotFoundError: If the download fails.
    """
    folder = Path(torch.hub.get_dir()) / 'checkpoints'
    path = folder / url.rpartition('/')[2]
    digest = re.search(r'-([0-9a-f]{8,})\.', path.name)
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), digest and digest[1], progress=False)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f'cannot download {url} to {path}: {error}; put the file there, or give another '
                'one with --cfg-options load_from=PATH'
            ) from error
    return path
