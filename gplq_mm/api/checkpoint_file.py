# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Checkpoint files with torch only: read without running code, written atomically."""

import os
import re
from pathlib import Path

import torch

from ..deployment.packed_file import from_safetensors, to_safetensors, unpack_checkpoint_
from ..stream.stored_file import unfinished_file

SAFETENSORS = '.safetensors'
"""Suffix of files in the layout of the safetensors library."""
_ADVICE = re.compile('weights_only|Check the documentation')
"""Lines of torch's message that name no cause, and advise to turn the protection off."""


def load_file(path: str | Path) -> dict:
    """Load a file of tensors and plain values to the CPU with ``weights_only=True``.

    Args:
        path: File that ``torch.save`` wrote; or a ``.safetensors`` file.

    Returns:
        The dict that the file holds; packed weights are unpacked.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, is not a dict, or would run code; or if packed
            weights are not those that were written.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'no checkpoint at {path.absolute()}')
    if path.suffix == SAFETENSORS:
        return from_safetensors(_read_bytes(path), path.absolute())
    try:
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything: KeyError, EOFError, ...
        raise ValueError(
            f'{path.absolute()} cannot be read as a checkpoint: {_reason(error)}'
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f'{path.absolute()} holds a {type(checkpoint).__name__}, not a checkpoint; '
            f"write it with torch.save(dict(state_dict=model.state_dict()), '{path.name}')"
        )
    unpack_checkpoint_(checkpoint, path.absolute())
    return checkpoint


def write_checkpoint(checkpoint: dict, path: str | Path) -> None:
    """Save a checkpoint atomically: ``path`` never is an incomplete file.

    Args:
        checkpoint: Tensors and plain Python values, so that ``weights_only=True`` reads it.
        path: Output file; missing folders are created, an existing file is replaced. The suffix
            ``.safetensors`` gives a file in the layout of the safetensors library.

    Raises:
        OSError: If the file cannot be written; an existing file does not change.
        ValueError: If a ``.safetensors`` file cannot hold a value of the checkpoint.
    """
    path = Path(path)
    content = to_safetensors(checkpoint) if path.suffix == SAFETENSORS else None
    with unfinished_file(path) as unfinished, unfinished.open('wb') as file:
        if content is None:
            torch.save(checkpoint, file)
        else:
            file.write(content.numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _read_bytes(path: Path) -> torch.Tensor:
    """A file's content, uint8."""
    content = bytearray(path.read_bytes())
    return torch.frombuffer(content, dtype=torch.uint8) if content else torch.tensor([]).byte()


def _reason(error: Exception) -> str:
    """The part of torch's long message that names the cause, without its unsafe advice."""
    cause = re.search(r'WeightsUnpickler error: *(.*?)(?: Please use|\n|$)', str(error))
    lines = [cause[1]] if cause else [line.strip() for line in str(error).splitlines()]
    reasons = [line for line in lines if line and not _ADVICE.search(line)]
    reason = reasons[0].rstrip('.') if reasons else 'no reason given'
    runs_code = '; loading it would run code' if 'global' in reason.lower() else ''
    return f'{type(error).__name__}: {reason}{runs_code}'
