# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Bytes that autograd saves."""

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn


def saved_bytes(module: nn.Module, run: Callable[[], Any]) -> int:
    """Storages that are saved while ``run`` is called, each once, parameters and buffers not."""
    own = {t.untyped_storage().data_ptr() for t in chain(module.parameters(), module.buffers())}
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    del output
    return sum(t.untyped_storage().nbytes() for t in held.values())
