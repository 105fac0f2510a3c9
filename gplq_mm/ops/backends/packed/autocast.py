# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Autocast as it was, for backward passes that compute a part of the forward pass again."""

from typing import Any

import torch
from torch import Tensor


def autocast_state(x: Tensor) -> dict[str, Any]:
    """Arguments of a ``torch.autocast`` that repeats the present one.

    Args:
        x: Tensor of the device in question.

    Examples:
        >>> autocast_state(torch.zeros(1))['enabled']
        False
    """
    kind = x.device.type
    return dict(
        device_type=kind,
        dtype=torch.get_autocast_dtype(kind),
        enabled=torch.is_autocast_enabled(kind),
        cache_enabled=False,
    )
