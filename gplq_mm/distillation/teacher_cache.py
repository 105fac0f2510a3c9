# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Teacher outputs stored on disk per image, so that an image needs one teacher pass.

An entry's name is a hash of the preprocessed image, the teacher and the requested outputs, so
an entry is only found for the input that it was computed from.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..stream.stored_file import read_stored, write_stored
from .mimic_features import Recording, run_teacher


class TeacherCache:
    """Folder of teacher outputs, one file per image.

    Args:
        folder: Folder of the files.
        identity: Text with everything else that the outputs depend on: checkpoint, layers, type.
        with_features: Whether a term uses the result of ``extract_feat()``.
    """

    def __init__(self, folder: str | Path, identity: str, with_features: bool) -> None:
        self.folder = Path(folder)
        self.identity = f'{identity} {with_features}'
        self.with_features = with_features

    def run(
        self, teacher: Any, inputs: Tensor, layers: Sequence[str], dtype: torch.dtype
    ) -> Recording:
        """As ``run_teacher``; from the cache if it has all images of the batch.

        Args:
            teacher: Float model.
            inputs: Preprocessed batch, ``(B, C, H, W)``.
            layers: Modules to watch.
            dtype: Type of the teacher's matrix products.
        """
        key = f'{self.identity} {sorted(layers)} {dtype}'
        files = [self._file(image, key) for image in inputs]
        if all(file.is_file() for file in files):
            found = [read_stored(file, inputs.device) for file in files]
            if all(entry is not None for entry in found):
                features, outputs = _stacked(found)
                return Recording(teacher, features, outputs)
        recording = run_teacher(teacher, inputs, layers, dtype)
        kept = (recording.features if self.with_features else None, recording.outputs)
        for index, file in enumerate(files):
            write_stored(_sliced(kept, index), file)
        return recording

    def _file(self, image: Tensor, key: str) -> Path:
        pixels = image.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        text = f'{key} {tuple(image.shape)} {image.dtype}'.encode()
        name = hashlib.blake2b(text + pixels, digest_size=16).hexdigest()
        return self.folder / name[:2] / f'{name}.pt'


def _sliced(output: Any, index: int) -> Any:
    """One image of a nested output."""
    if isinstance(output, Tensor):
        return output[index].detach().cpu().clone()
    if isinstance(output, dict):
        return {key: _sliced(value, index) for key, value in output.items()}
    if isinstance(output, list | tuple):
        return type(output)(_sliced(value, index) for value in output)
    return output


def _stacked(entries: Sequence[Any]) -> Any:
    """Inverse of ``_sliced``."""
    first = entries[0]
    if isinstance(first, Tensor):
        return torch.stack(list(entries))
    if isinstance(first, dict):
        return {key: _stacked([entry[key] for entry in entries]) for key in first}
    if isinstance(first, list | tuple):
        return type(first)(_stacked(parts) for parts in zip(*entries, strict=True))
    return first
