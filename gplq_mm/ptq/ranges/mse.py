# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Weight range with the least squared error."""

from torch import Tensor

from ...quantizers import QuantSpec, qparams_from_range
from ...quantizers.range_search import search_range
from ..algorithms import register_weight_ptq
from ..task import RangePTQ


@register_weight_ptq('mse')
class MSEPTQ(RangePTQ):
    """Shrink the range of each output channel where that lowers the squared error.

    Args:
        steps: Candidates per search, see ``search_range``.

    Raises:
        ValueError: If ``steps`` is not an integer of at least 2.
    """

    def __init__(self, steps: int = 80) -> None:
        if not isinstance(steps, int) or steps < 2:
            raise ValueError(f'mse steps={steps!r}: write an integer of at least 2')
        self.steps = steps

    def calculate_qparams(self, rows: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """As in the base class."""
        lo, hi = search_range(
            rows,
            None,
            rows.amin(1),
            rows.amax(1),
            lambda a, b: qparams_from_range(a, b, spec),
            spec.quant_range,
            self.steps,
            spec.symmetric,
        )
        return qparams_from_range(lo, hi, spec)
