# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Automatic mixed precision on the CPU; MMEngine's own wrapper requires an accelerator."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.optim import OptimWrapper
from mmengine.runner.amp import autocast
from torch import nn

from ...registry import OPTIM_WRAPPERS

_AMP_TYPES = ('AmpOptimWrapper', 'mmengine.AmpOptimWrapper')
_GPU_ONLY = ('loss_scale', 'use_fsdp')


@OPTIM_WRAPPERS.register_module()
class CpuAmpOptimWrapper(OptimWrapper):
    """Forward pass under bfloat16 autocast; it has float32's range, so the loss needs no scaling.

    Weights, gradients, optimizer state and all quantizer arithmetic stay float32.

    Args:
        dtype: ``bfloat16``, the only type of autocast on a CPU.
        **kwargs: As for ``OptimWrapper``.

    Raises:
        ValueError: If ``dtype`` is not ``bfloat16``.
    """

    def __init__(self, dtype: str | torch.dtype | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if dtype not in (None, 'bfloat16', torch.bfloat16):
            raise ValueError(
                f'optim_wrapper.dtype={dtype!r}: mixed precision on a CPU is bfloat16; write '
                "optim_wrapper=dict(type='AmpOptimWrapper', dtype='bfloat16')"
            )
        self.cast_dtype = torch.bfloat16

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Autocast, and no gradient synchronization while gradients accumulate."""
        with super().optim_context(model), autocast(device_type='cpu', dtype=self.cast_dtype):
            yield


def on_this_device(wrapper: dict[str, Any]) -> dict[str, Any]:
    """Settings of an optimizer wrapper; without an accelerator, mixed precision is the CPU's.

    Args:
        wrapper: ``type`` and its arguments.
    """
    kind = getattr(wrapper['type'], '__name__', wrapper['type'])
    if kind not in _AMP_TYPES or get_device() != 'cpu':
        return wrapper
    kept = {k: v for k, v in wrapper.items() if k not in _GPU_ONLY}
    return {**kept, 'type': 'gplq_mm.CpuAmpOptimWrapper'}
