# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Weight range from percentiles, chosen from a small grid for each output channel.

Source: arXiv 2506.11784 (GPLQ) uses the percentile search of arXiv 2212.08254 (RepQ-ViT),
which minimizes the squared error.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...quantizers import QuantSpec, qparams_from_range
from ...quantizers.range_search import quantization_error
from ..algorithms import register_weight_ptq
from ..task import RangePTQ


@register_weight_ptq('percentile')
class PercentilePTQ(RangePTQ):
    """The percentile with the least squared error, chosen for each output channel.

    Args:
        grid: Share of the weights kept at each end, each in (0.5, 1].

    Raises:
        ValueError: If the grid is empty or a value lies outside (0.5, 1].
    """

    def __init__(self, grid: Sequence[float] = (0.999, 0.9999, 0.99999)) -> None:
        self.grid = tuple(float(p) for p in grid)
        if not self.grid or not all(0.5 < p <= 1 for p in self.grid):
            raise ValueError(
                f'percentile grid {grid!r}: write values in (0.5, 1], e.g. [0.999, 0.9999]'
            )

    def calculate_qparams(self, rows: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """As in the base class."""
        ordered = rows.sort(dim=1).values
        best: tuple[Tensor, Tensor, Tensor] | None = None
        for percentile in self.grid:
            lo, hi = sorted_quantile(ordered, 1 - percentile), sorted_quantile(ordered, percentile)
            scale, zero_point = qparams_from_range(lo, hi, spec)
            error = quantization_error(ordered, None, scale, zero_point, spec.quant_range)
            if best is None:
                best = (error, scale, zero_point)
                continue
            better = error < best[0]
            best = (
                torch.where(better, error, best[0]),
                torch.where(better, scale, best[1]),
                torch.where(better, zero_point, best[2]),
            )
        assert best is not None
        return best[1], best[2]


def sorted_quantile(ordered: Tensor, q: float) -> Tensor:
    """Quantile of rows by linear interpolation (torch.quantile refuses large tensors).

    Args:
        ordered: ``(rows, elements)``, ascending along the last dimension.
        q: From 0 to 1.

    Returns:
        ``(rows,)``.

    Examples:
        >>> sorted_quantile(torch.tensor([[0.0, 1.0, 5.0]]), 0.75)
        tensor([3.])
    """
    position = q * (ordered.shape[1] - 1)
    index = min(int(position), ordered.shape[1] - 1)
    above = min(index + 1, ordered.shape[1] - 1)
    return torch.lerp(ordered[:, index], ordered[:, above], position - index)
