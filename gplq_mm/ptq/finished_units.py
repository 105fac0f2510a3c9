# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Finished units on disk, so that a killed run goes on where it was."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from ..stream.distributed import world


class FinishedUnits:
    """State of the units that an algorithm has finished.

    A file is written under another name and renamed, so that a kill leaves none half
    written. The folder's name tells algorithm, images and starting point: another run's
    files are never taken.

    Args:
        folder: Parent folder; None to keep nothing.
        title: Algorithm with its options, and the images.
        model: The model before the algorithm runs.
    """

    def __init__(self, folder: str | None, title: str, model: nn.Module) -> None:
        self.folder = None
        if folder is not None:
            self.folder = Path(folder, fingerprint(title, model))
            self.folder.mkdir(parents=True, exist_ok=True)

    def restore(self, index: int, module: nn.Module) -> bool:
        """Load a unit's state if it is there."""
        if self.folder is None or not self._path(index).is_file():
            return False
        module.load_state_dict(torch.load(self._path(index), weights_only=True))
        return True

    def save(self, index: int, module: nn.Module) -> None:
        """Keep a unit's state (main process only)."""
        if self.folder is None or world()[0] != 0:
            return
        temporary = self._path(index).with_suffix('.tmp')
        torch.save(module.state_dict(), temporary)
        os.replace(temporary, self._path(index))

    def count(self, units: Iterable[object]) -> int:
        """How many of the units are there from the beginning on, without a gap."""
        found = 0
        for index, _ in enumerate(units):
            if self.folder is None or not self._path(index).is_file():
                break
            found += 1
        return found

    def _path(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f'unit_{index:03d}.pt'


@torch.no_grad()
def fingerprint(title: str, model: nn.Module) -> str:
    """Twenty hexadecimal digits that change with the title or any number of the model."""
    digest = hashlib.sha256(title.encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:20]
