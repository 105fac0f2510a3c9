# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Half precision for the teacher's forward pass, on devices with hardware support."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def teacher_dtype(setting: str, device: torch.device) -> torch.dtype:
    """Type of the teacher's matrix products.

    Args:
        setting: ``engine.teacher``: a type's name, or ``auto`` for bfloat16 on GPUs with
            hardware support, else float32. On a CPU ``auto`` is float32, so that runs are
            equal bit for bit on any processor.
        device: Device of the teacher.

    Examples:
        >>> teacher_dtype('float32', torch.device('cpu'))
        torch.float32
    """
    if setting != 'auto':
        return getattr(torch, setting)
    is_fast = device.type == 'cuda' and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if is_fast else torch.float32


@contextmanager
def teacher_precision(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Autocast to ``dtype``, unless it is float32 or autocast is active already."""
    if dtype == torch.float32 or torch.is_autocast_enabled(device.type):
        yield
        return
    with torch.autocast(device.type, dtype):
        yield


def as_float(output: Any) -> Any:
    """Half-precision tensors of a nested output as float32."""
    if isinstance(output, Tensor):
        return output.float() if output.dtype in (torch.bfloat16, torch.float16) else output
    if isinstance(output, dict):
        return {key: as_float(value) for key, value in output.items()}
    if type(output) in (list, tuple):
        return type(output)(as_float(value) for value in output)
    return output
