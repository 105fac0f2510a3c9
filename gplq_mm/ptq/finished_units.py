# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Finished units stored on disk, so that a killed run can continue."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from ..stream.distributed import world
from ..stream.stored_file import read_stored, write_stored


class FinishedUnits:
    """State of the units that an algorithm has finished.

    A file is written under a temporary name and renamed, so that a kill leaves no partial
    file. The folder's name is a hash of algorithm, images and initial model: files of
    another run are never used.

    Args:
        folder: Parent folder; None to store nothing.
        title: Algorithm with its options, and the images.
        model: The model before the algorithm runs.
    """

    def __init__(self, folder: str | None, title: str, model: nn.Module) -> None:
        self.folder = None
        if folder is not None:
            self.folder = Path(folder, fingerprint(title, model))
            self.folder.mkdir(parents=True, exist_ok=True)

    def restore(self, index: int, module: nn.Module) -> bool:
        """Load a unit's state if it is stored, and not damaged."""
        state = None if self.folder is None else read_stored(self._path(index))
        if state is None:
            return False
        module.load_state_dict(state)
        return True

    def save(self, index: int, module: nn.Module) -> None:
        """Store a unit's state (main process only)."""
        if self.folder is None or world()[0] != 0:
            return
        write_stored(module.state_dict(), self._path(index))

    def restore_first(self, modules: Iterable[nn.Module]) -> int:
        """Load the stored units before the first missing or damaged one; returns their number."""
        found = 0
        for index, module in enumerate(modules):
            if not self.restore(index, module):
                break
            found += 1
        return found

    def _path(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f'unit_{index:03d}.pt'


@torch.no_grad()
def fingerprint(title: str, model: nn.Module) -> str:
    """Twenty hexadecimal digits, a hash of the title and the model's state."""
    digest = hashlib.sha256(title.encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:20]
