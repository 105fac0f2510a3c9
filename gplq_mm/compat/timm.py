# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Undocumented parts of timm that the package uses.

No other file uses a private name of timm; ``tests/test_compat/test_timm.py`` has a test for each
function here, which fails if timm changes.
"""

from typing import Any

from torch import Tensor


def relative_position_bias(attention: Any) -> Tensor:
    """Bias that BEiT's attention adds to its logits, ``(1, heads, N, N)``.

    Args:
        attention: ``timm.models.beit.Attention`` with a table of relative positions.
    """
    return attention._get_rel_pos_bias()
