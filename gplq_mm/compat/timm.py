# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Everything that the package uses of timm and that timm does not document.

No other file touches an underscored name of timm's; ``tests/test_compat/test_timm.py`` has a test
for each function here, which fails by name where timm changes.
"""

from typing import Any

from torch import Tensor


def relative_position_bias(attention: Any) -> Tensor:
    """Bias that BEiT's attention adds to its logits, ``(1, heads, N, N)``.

    Args:
        attention: ``timm.models.beit.Attention`` with a table of relative positions.
    """
    return attention._get_rel_pos_bias()
