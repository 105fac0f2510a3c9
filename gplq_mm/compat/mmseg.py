# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Undocumented parts of mmsegmentation that the package uses.

No other file uses a private name of mmsegmentation; ``tests/test_compat/test_mmseg.py`` has a test
for each function here, which fails if mmsegmentation changes.
"""

from typing import Any

from torch import Tensor


def input_of_head(head: Any, features: Any) -> Tensor:
    """What a decode head takes from the backbone's features, ``(B, C, H, W)``.

    Args:
        head: ``BaseDecodeHead`` that selects one level, or joins several.
        features: Maps of all levels, each ``(B, C_i, H_i, W_i)``.
    """
    return head._transform_inputs(features)
