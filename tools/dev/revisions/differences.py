# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Bit-for-bit comparison of nested results: tensors, arrays, numbers, text, dicts, lists."""

import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

LEFT_OUT = {
    'seconds': 'timing',
    'latency_ms': 'timing',
    'latency_ratio': 'timing',
    'time': 'timing, date',
    'data_time': 'timing',
    'train/time': 'timing, in the history of MMEngine',
    'train/data_time': 'timing, in the history of MMEngine',
    'peak_memory_bytes': 'depends on the allocator, not on the numbers',
    'memory': 'depends on the allocator, not on the numbers',
    'experiment_name': 'holds the date',
    'float_checkpoint.path': 'absolute path',
    'last_ckpt': 'absolute path',
    'run': 'hash of the checkpoint file, which holds the date, and of the version',
    'versions': 'versions',
    'gplq_mm_version': 'version',
    'mmengine_version': 'version',
}
"""Keys that are not compared, and why; `parent.key` names a key in one place only."""


@dataclass(frozen=True)
class Difference:
    """Where two results differ, and both values as text.

    Attributes:
        where: Keys and indices from the root, as in `state_dict > head.weight > (0, 3)`.
        old: Value of the old revision.
        new: Value of the new revision.
    """

    where: str
    old: str
    new: str

    def __str__(self) -> str:
        return f'{self.where}: {self.old} != {self.new}'


class Comparison:
    """Compares two results and counts what was compared.

    Args:
        ignored: More keys to leave out, beside `LEFT_OUT`.
    """

    def __init__(self, ignored: Collection[str] = ()) -> None:
        self.left_out = {*LEFT_OUT, *ignored}
        self.compared = 0

    def differences(self, old: Any, new: Any, path: tuple[str, ...] = ()) -> Iterator[Difference]:
        """Yield a difference for each value that is not equal to the last bit.

        Args:
            old: Result of the old revision.
            new: Result of the new revision.
            path: Keys that lead to the two.
        """
        if type(old) is not type(new):
            yield _difference(
                path, f'{type(old).__name__} {old!r}', f'{type(new).__name__} {new!r}'
            )
        elif isinstance(old, Tensor | np.ndarray) and old.dtype != object:
            self.compared += 1
            yield from _arrays(old, new, path)
        elif isinstance(old, np.ndarray):
            yield from self._sequences(old.tolist(), new.tolist(), path)
        elif isinstance(old, Mapping):
            yield from self._mappings(old, new, path)
        elif isinstance(old, str) and ('\n' in old or '\n' in new):
            yield from self._sequences(old.splitlines(), new.splitlines(), path)
        elif isinstance(old, Sequence) and not isinstance(old, str | bytes):
            yield from self._sequences(old, new, path)
        elif hasattr(old, '__dict__') and not callable(old):
            yield from self._mappings(vars(old), vars(new), path)
        else:
            self.compared += 1
            if _bits(old) != _bits(new):
                yield _difference(path, repr(old), repr(new))

    def _mappings(
        self, old: Mapping[Any, Any], new: Mapping[Any, Any], path: tuple[str, ...]
    ) -> Iterator[Difference]:
        own, other = self._keys(old, path), self._keys(new, path)
        for key in [k for k in own if k not in new]:
            yield _difference((*path, str(key)), 'present', 'missing')
        for key in [k for k in other if k not in old]:
            yield _difference((*path, str(key)), 'missing', 'present')
        if set(own) == set(other) and own != other:
            i = next(i for i, pair in enumerate(zip(own, other, strict=True)) if len({*pair}) == 2)
            yield _difference((*path, f'key number {i}'), repr(own[i]), repr(other[i]))
        for key in own:
            if key in new:
                yield from self.differences(old[key], new[key], (*path, str(key)))

    def _sequences(
        self, old: Sequence[Any], new: Sequence[Any], path: tuple[str, ...]
    ) -> Iterator[Difference]:
        if len(old) != len(new):
            yield _difference((*path, 'length'), str(len(old)), str(len(new)))
        for i, (one, two) in enumerate(zip(old, new, strict=False)):
            yield from self.differences(one, two, (*path, str(i)))

    def _keys(self, mapping: Mapping[Any, Any], path: tuple[str, ...]) -> list[Any]:
        parent = path[-1] if path else ''
        return [k for k in mapping if not self.left_out & {k, f'{parent}.{k}'}]


def _difference(path: tuple[str, ...], old: str, new: str) -> Difference:
    limit = 160
    cut = [text if len(text) <= limit else f'{text[:limit]}...' for text in (old, new)]
    return Difference(' > '.join(path) or 'root', *cut)


def _arrays(old: Any, new: Any, path: tuple[str, ...]) -> Iterator[Difference]:
    """One difference at most: dtype and shape, else the first element."""
    kinds = [f'{x.dtype} {tuple(x.shape)}' for x in (old, new)]
    if kinds[0] != kinds[1]:
        yield _difference((*path, 'dtype and shape'), *kinds)
        return
    rows = [_element_bytes(x) for x in (old, new)]
    unequal = (rows[0] != rows[1]).any(1).nonzero()[0]
    if len(unequal):
        index = tuple(int(i) for i in np.unravel_index(unequal[0], tuple(old.shape)))
        more = f' and {len(unequal) - 1} more of {len(rows[0])}' if len(unequal) > 1 else ''
        yield _difference((*path, f'{index}{more}'), *(repr(x[index].item()) for x in (old, new)))


def _element_bytes(array: Any) -> np.ndarray:
    """`(elements, bytes of one)`, whatever the dtype of a tensor or an array."""
    if isinstance(array, Tensor):
        flat = array.detach().cpu().contiguous().reshape(-1)
        size = flat.element_size()
        raw = flat.view(torch.uint8).numpy() if len(flat) else np.empty(0, np.uint8)
        return raw.reshape(-1, size)
    return np.frombuffer(array.tobytes(), np.uint8).reshape(-1, array.itemsize)


def _bits(value: Any) -> Any:
    """What equal bits make equal: -0.0 is not 0.0, NaN is itself."""
    if isinstance(value, float):
        return struct.pack('<d', value)
    if callable(value):
        return getattr(value, '__qualname__', repr(value))
    return value
