# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""How far stage 1 moved the learned scales."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SHOWN = 20
"""Quantizers that a report lists."""


@torch.no_grad()
def scale_changes(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], count: int = SHOWN
) -> list[dict[str, Any]]:
    """The quantizers whose scales moved most, the largest change first.

    Args:
        before: State dict after calibration.
        after: State dict after stage 1.
        count: Number of quantizers.

    Returns:
        For each ``name`` of the quantizer; ``before`` and ``after``, medians over its channels;
        ``octaves``, the root mean square over its channels of ``log2(after / before)``. Scales
        that did not move, and those of another shape, are left out.

    Examples:
        >>> before, after = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0])
        >>> scale_changes({'x_quantizer.scale': before}, {'x_quantizer.scale': after})
        [{'name': 'x_quantizer', 'before': 1.0, 'after': 2.0, 'octaves': 1.0}]
    """
    found = []
    for key, new in after.items():
        old = before.get(key)
        if not key.endswith('_quantizer.scale') or old is None or old.shape != new.shape:
            continue
        old, new = old.double().abs().cpu(), new.double().abs().cpu()
        moved = (new.log2() - old.log2()).square().mean().sqrt().item()
        if 0 < moved < float('inf'):
            name = key.removesuffix('.scale')
            found.append((moved, name, old.median().item(), new.median().item()))
    found.sort(reverse=True)
    return [
        {'name': name, 'before': old, 'after': new, 'octaves': moved}
        for moved, name, old, new in found[:count]
    ]
