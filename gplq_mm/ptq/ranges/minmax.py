# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Weight range without clipping."""

from torch import Tensor

from ...quantizers import QuantSpec, qparams_from_range
from ..algorithms import register_weight_ptq
from ..task import RangePTQ


@register_weight_ptq('minmax')
class MinMaxPTQ(RangePTQ):
    """The range covers the largest weight; round to nearest."""

    def calculate_qparams(self, rows: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """As in the base class."""
        return qparams_from_range(rows.amin(1), rows.amax(1), spec)
