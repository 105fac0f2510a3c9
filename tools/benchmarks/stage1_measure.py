# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Measurements of the stage-1 benchmark: saved bytes, step time, peak memory."""

import copy
import time
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from gplq_mm.integrations.mm.optim import GPLQOptimWrapperConstructor
from gplq_mm.integrations.mm.run.resources import StageMeter

Times = tuple[float, float]


def saved_bytes(model: Any, batch: Any) -> int:
    """Bytes that autograd holds between the forward and the backward pass of one step.

    The rule: every tensor that ``torch.autograd.graph.saved_tensors_hooks`` sees while the
    losses are computed counts with its whole storage, each storage once (views share it),
    parameters and buffers excluded. It depends neither on the device nor on the allocator.

    Args:
        model: Model in training mode.
        batch: Batch as from a data loader.
    """
    own = {t.untyped_storage().data_ptr() for t in chain(model.parameters(), model.buffers())}
    held: dict[int, Tensor] = {}  # keeps each storage alive, so that no address is reused

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            held[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = model(**model.data_preprocessor(copy.deepcopy(batch), True), mode='loss')
    del losses
    return sum(t.untyped_storage().nbytes() for t in held.values())


def optimizer(model: Any) -> Any:
    """The recipe's AdamW; the float model gets the same learning rate."""
    if hasattr(model, 'gplq'):
        return GPLQOptimWrapperConstructor({})(model)
    from mmengine.optim import OptimWrapper

    return OptimWrapper(torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.0))


def train_step(model: Any, batch: Any, optim_wrapper: Any) -> Times:
    """Seconds of one training step: ``(wall time, processor time of this process)``.

    On a machine with other load the processor time varies less.
    """
    batch = copy.deepcopy(batch)
    _synchronize(model)
    start = time.perf_counter(), time.process_time()
    model.train_step(batch, optim_wrapper)
    _synchronize(model)
    return time.perf_counter() - start[0], time.process_time() - start[1]


def interleaved(
    models: dict[Any, nn.Module], batches: list[Any], warmup: int, steps: int
) -> dict[Any, list[Times]]:
    """Seconds of each step; engines alternate, so that drift affects all equally."""
    optimizers = {key: optimizer(model) for key, model in models.items()}
    seconds: dict[Any, list[Times]] = {key: [] for key in models}
    for step in range(warmup + steps):
        for key, model in models.items():
            taken = train_step(model, batches[step % len(batches)], optimizers[key])
            if step >= warmup:
                seconds[key].append(taken)
    return seconds


def peak_memory(model: Any, batch: Any) -> int:
    """Peak memory in bytes of the second training step (optimizer state is allocated by then)."""
    optim_wrapper = optimizer(model)
    train_step(model, batch, optim_wrapper)
    with StageMeter() as meter:
        train_step(model, batch, optim_wrapper)
    return meter.peak_memory_bytes


def _synchronize(model: nn.Module) -> None:
    device = next(model.parameters()).device
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
