# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Reductions of observer statistics across ranks; all of them exact."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..quantizers import FakeQuantizer, Observer


def world() -> tuple[int, int]:
    """``(rank, world_size)``; ``(0, 1)`` without a process group.

    Examples:
        >>> world()
        (0, 1)
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def global_number(seen: int) -> int:
    """Number over all ranks of this rank's batch ``seen``: rank r has r, r + world, ..."""
    rank, size = world()
    return rank + size * seen


def synchronize_observer(quantizer: FakeQuantizer) -> None:
    """Reduce the statistics of a quantizer's observer over all ranks.

    A rank whose images did not reach the quantizer contributes the neutral
    element. Does nothing without a process group.
    """
    observer = quantizer.observer
    assert observer is not None
    if world()[1] == 1:
        return
    rows, device = max(1, quantizer.scale.numel()), quantizer.scale.device
    for name, how in observer.reductions.items():
        value = getattr(observer, name)
        if how == 'gather':
            setattr(observer, name, interleave(value, device))
        else:
            setattr(observer, name, _all_reduce(value, how, observer, rows, device))
    updates = torch.tensor(observer.num_updates, device=device)
    dist.all_reduce(updates)
    observer.num_updates = int(updates)


def all_reduce_sum(total: Tensor) -> None:
    """Sum a tensor of any shape over all ranks, in place; exact for integers and exact sums."""
    _reduce_in_place(total, dist.ReduceOp.SUM)


def all_reduce_max(value: Tensor) -> Tensor:
    """Largest values over all ranks, same shape."""
    _reduce_in_place(value, dist.ReduceOp.MAX)
    return value


def on_all_ranks(fact: bool) -> bool:
    """Whether a condition is true on every rank, to decide on further collectives together."""
    return not all_reduce_max(torch.tensor(float(not fact))).item()


def broadcast_from_0(value: Tensor) -> Tensor:
    """Broadcast rank 0's values, any shape; factorizations differ between ranks."""
    if world()[1] > 1:
        value = value.contiguous()
        dist.broadcast(value, 0)
    return value


def gather(value: Any) -> list[Any]:
    """One picklable value of each rank, in order, on every rank."""
    if world()[1] == 1:
        return [value]
    values: list[Any] = [None] * world()[1]
    dist.all_gather_object(values, value)
    return values


def _reduce_in_place(value: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
    """Reduce a tensor of any device; NCCL does not support CPU tensors."""
    if world()[1] == 1:
        return
    if value.device.type == 'cpu' and dist.get_backend() == 'nccl':
        moved = value.cuda()
        dist.all_reduce(moved, operation)
        value.copy_(moved)
    else:
        dist.all_reduce(value, operation)


def _all_reduce(
    value: Tensor | None, how: str, observer: Observer, rows: int, device: torch.device
) -> Tensor:
    operations = {'min': dist.ReduceOp.MIN, 'max': dist.ReduceOp.MAX, 'sum': dist.ReduceOp.SUM}
    if value is None:
        value = observer.neutral(how, rows, device)
    value = value.contiguous()
    dist.all_reduce(value, operations[how])
    return value


def interleave(updates: list[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of any shape of all ranks in image order: rank r holds images r, r + world, ..."""
    shares: list[list[Tensor]] = gather([u.cpu() for u in updates])
    longest = max(len(share) for share in shares)
    ordered = [s[i] for i in range(longest) for s in shares if i < len(s)]
    return [u.to(device) for u in ordered]
