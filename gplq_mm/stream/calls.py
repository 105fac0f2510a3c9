# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Calls of a module with their inputs, stored in memory up to a budget and on disk beyond it."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass
class Call:
    """Arguments of one call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def map(self, function: Callable[[Tensor], Any]) -> 'Call':
        """The call with every tensor replaced by ``function(tensor)``."""
        return Call(map_tensors(self.args, function), map_tensors(self.kwargs, function))

    def filled(self, mark: Any, give: Callable[[], Any]) -> 'Call':
        """The call with ``give()`` in place of each ``mark``, in order."""

        def fill(value: Any) -> Any:
            return give() if value is mark else value

        return Call(map_leaves(self.args, fill), map_leaves(self.kwargs, fill))

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, in order."""
        found: list[Tensor] = []
        self.map(found.append)
        return found

    def signature(self) -> str:
        """Equal for calls that can run as one batch: shapes, and all other arguments."""
        return repr(self.map(lambda t: (tuple(t.shape[1:]), str(t.dtype))))


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Replace the tensors in nested tuples, lists and dicts.

    Examples:
        >>> map_tensors((torch.zeros(2), [3, {'a': torch.zeros(1)}]), lambda t: len(t))
        (2, [3, {'a': 1}])
    """
    return map_leaves(value, lambda v: function(v) if isinstance(v, Tensor) else v)


def map_leaves(value: Any, function: Callable[[Any], Any]) -> Any:
    """Replace every leaf of nested lists, tuples and dicts by ``function(leaf)``."""
    if isinstance(value, tuple | list):
        return type(value)(map_leaves(v, function) for v in value)
    if isinstance(value, dict):
        return {k: map_leaves(v, function) for k, v in value.items()}
    return function(value)


def all_tensors(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts, in order."""
    found: list[Tensor] = []
    map_tensors(value, found.append)
    return found


def floating_tensors(value: Any) -> list[Tensor]:
    """The non-empty floating-point tensors in nested tuples, lists and dicts, in order."""
    return [t for t in all_tensors(value) if t.is_floating_point() and t.numel()]


class CallStore:
    """List of calls on the CPU; tensors beyond the budget are in a temporary folder.

    Args:
        budget_bytes: Bytes of tensors kept in memory.
        folder: Parent of the temporary folder, created if absent; the system's temporary
            folder if None.

    Attributes:
        bytes_in_memory: Bytes of the tensors that are not on disk.
        batches: Number of calls in each batch of images.
    """

    def __init__(self, budget_bytes: int, folder: str | None = None) -> None:
        self.budget_bytes, self.folder = budget_bytes, folder
        self.bytes_in_memory = 0
        self.batches: list[int] = []
        self._calls: list[Call | Path] = []
        self._disk: tempfile.TemporaryDirectory[str] | None = None

    def like(self) -> 'CallStore':
        """An empty store with the same settings."""
        return CallStore(self.budget_bytes, self.folder)

    def append(self, call: Call) -> None:
        """Store a copy of a call."""
        copied = call.map(lambda t: t.detach().to('cpu', copy=True))
        size = sum(t.numel() * t.element_size() for t in copied.tensors)
        if self.bytes_in_memory + size <= self.budget_bytes:
            self.bytes_in_memory += size
            self._calls.append(copied)
            return
        path = self._disk_folder() / f'{len(self._calls)}.pt'
        torch.save([t.clone() for t in copied.tensors], path)
        self._skeletons[len(self._calls)] = copied.map(lambda t: _HOLE)
        self._calls.append(path)

    def _disk_folder(self) -> Path:
        if self._disk is None:
            if self.folder is not None:
                Path(self.folder).mkdir(parents=True, exist_ok=True)
            self._disk = tempfile.TemporaryDirectory(prefix='gplq_calls_', dir=self.folder)
            self._skeletons: dict[int, Call] = {}
        return Path(self._disk.name)

    def __len__(self) -> int:
        return len(self._calls)

    def __getitem__(self, index: int) -> Call:
        """A copy of a call, which may be changed in place."""
        kept = self._calls[index]
        if isinstance(kept, Call):
            return kept.map(torch.clone)
        tensors = iter(torch.load(kept, weights_only=True))
        return self._skeletons[index].filled(_HOLE, tensors.__next__)

    def __iter__(self) -> Iterator[Call]:
        return (self[i] for i in range(len(self)))


class _Hole:
    """Placeholder of a tensor on disk."""


_HOLE = _Hole()
