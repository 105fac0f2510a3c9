# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Random batches of stored calls."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .calls import Call, CallStore
from .distributed import all_reduce_max, gather, world


class BatchSampler:
    """Draws random batches of calls with equal signatures.

    Args:
        store: Calls of a unit.
        batch_size: Most calls in a batch.
        max_elements: Most elements of a batch's input, so that memory stays bounded; a
            single call may exceed it.
        generator: Random generator.
    """

    def __init__(
        self, store: CallStore, batch_size: int, max_elements: int, generator: torch.Generator
    ) -> None:
        self.generator = generator
        groups: dict[str, list[int]] = {}
        sizes: dict[str, int] = {}
        for index, call in enumerate(store):
            signature = f'{call.signature()} {_without_batch(call)}'
            groups.setdefault(signature, []).append(index)
            sizes[signature] = max(sum(t.numel() for t in call.tensors), 1)
        self.groups = list(groups.values())
        self.batch_sizes = [
            min(batch_size, max(1, max_elements // sizes[s]), len(groups[s])) for s in groups
        ]
        self._weights = torch.tensor([float(len(g)) for g in self.groups])

    def draw(self) -> list[int]:
        """Indices of different calls with one signature."""
        chosen = int(torch.multinomial(self._weights, 1, generator=self.generator))
        group = self.groups[chosen]
        order = torch.randperm(len(group), generator=self.generator)
        return [group[i] for i in order[: self.batch_sizes[chosen]].tolist()]


def join(calls: Sequence[Call]) -> Call:
    """Calls of one signature as one call, tensors joined along the first dimension.

    Tensors whose first dimension is not the batch (such as a relative position bias shared by
    all blocks) are equal in all calls of a signature and are passed unchanged.
    """
    if len(calls) == 1:
        return calls[0]
    columns = iter(zip(*(call.tensors for call in calls), strict=True))
    batch = _batch(calls[0])

    def joined(_: Tensor) -> Tensor:
        column = next(columns)
        return torch.cat(column) if _length(column[0]) == batch else column[0]

    return calls[0].map(joined)


def _batch(call: Call) -> int | None:
    """Batch size of a call, the length of its first tensor: images, or windows."""
    return next((_length(t) for t in call.tensors), None)


def _length(tensor: Tensor) -> int | None:
    return len(tensor) if tensor.dim() else None


def _without_batch(call: Call) -> list[str]:
    """Hashes of the tensors whose first dimension is not the batch."""
    batch = _batch(call)
    return [
        hashlib.sha256(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for t in call.tensors
        if _length(t) != batch
    ]


def of_all_ranks(store: CallStore, empty: CallStore) -> CallStore:
    """Calls of all ranks on every rank, in the order of a single-rank run.

    Args:
        store: This rank's calls; ``store.batches`` has the number of calls per batch.
        empty: Store for the result.
    """
    if world()[1] == 1:
        return store
    most = all_reduce_max(torch.tensor(len(store.batches)))
    position = 0
    for index in range(int(most)):
        count = store.batches[index] if index < len(store.batches) else 0
        mine = [store[position + i] for i in range(count)]
        position += count
        for share in gather(mine):
            for call in share:
                empty.append(call)
            empty.batches.append(len(share))
    return empty


def mixed(call: Call, reference: Call, drop: float, generator: torch.Generator) -> Call:
    """The call with a random share ``drop`` of its elements taken from ``reference``."""
    others = iter(reference.tensors)

    def mix(x: Tensor) -> Tensor:
        other = next(others)
        if not x.is_floating_point():
            return x
        return torch.where(torch.rand(x.shape, generator=generator) < drop, other, x)

    return call.map(mix)
