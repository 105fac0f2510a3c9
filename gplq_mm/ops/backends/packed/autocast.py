# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""State of autocast in the forward pass, for backward passes that recompute a part of it."""

from typing import Any

import torch
from torch import Tensor


def autocast_state(x: Tensor) -> dict[str, Any]:
    """Arguments of ``torch.autocast`` for the current state.

    Args:
        x: Tensor of any shape on the device.

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
