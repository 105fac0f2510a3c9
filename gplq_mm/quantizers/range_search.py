# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Search of the range with the least squared quantization error.

Source: the MSE calibration of arXiv 2106.08295, section 3.1, done on weighted
values (a histogram or the values themselves) for all scales at once.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .functional import dequantize, quantize

QParams = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
_ROW_BUDGET = 1 << 19
"""Elements evaluated at once, to bound the memory and fit into the cache."""
_JOINT = ((1, 1),)
_EACH_END = ((1, 1), (0, 1), (1, 0), (0, 1), (1, 0))


def quantization_error(
    values: Tensor,
    weight: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
    quant_range: tuple[int, int],
) -> Tensor:
    """Weighted squared error of quantizing rows of values.

    Args:
        values: ``(scales, elements)``.
        weight: Weight per element, same shape, or None for 1.
        scale: ``(scales,)``.
        zero_point: ``(scales,)``.
        quant_range: ``(qmin, qmax)``.

    Returns:
        Error per row, ``(scales,)``.

    Examples:
        >>> values = torch.tensor([[0.0, 1.0, 2.4]])
        >>> s, z = torch.tensor([1.0]), torch.tensor([0.0])
        >>> quantization_error(values, None, s, z, (-8, 7))
        tensor([0.1600])
    """
    s, z = scale[:, None], zero_point[:, None]
    error = dequantize(quantize(values, s, z, *quant_range), s, z).sub_(values).square_()
    return (error if weight is None else error.mul_(weight)).sum(1)


def search_range(
    values: Tensor,
    weight: Tensor | None,
    lo: Tensor,
    hi: Tensor,
    qparams: QParams,
    quant_range: tuple[int, int],
    steps: int = 80,
    symmetric: bool = False,
) -> tuple[Tensor, Tensor]:
    """Shrink ``[lo, hi]`` where that lowers the squared error.

    First both ends shrink together. Then each end of an asymmetric range shrinks
    alone, twice, to fit uneven tails (``5 * steps`` evaluations); a symmetric range
    has a single scale to find.

    Args:
        values: ``(scales, elements)``.
        weight: Weight per element, same shape, or None.
        lo: Smallest value per row, ``(scales,)``.
        hi: Largest value per row, ``(scales,)``.
        qparams: Maps a range to ``(scale, zero_point)``.
        quant_range: ``(qmin, qmax)``.
        steps: Candidates per search.
        symmetric: Whether the grid is symmetric.

    Returns:
        The best ``(lo, hi)``, each ``(scales,)``; never worse than the given range.
    """
    rows = max(1, _ROW_BUDGET // max(values.shape[1], 1))
    if len(values) > rows:
        parts = [
            search_range(
                values[i : i + rows],
                None if weight is None else weight[i : i + rows],
                lo[i : i + rows],
                hi[i : i + rows],
                qparams,
                quant_range,
                steps,
                symmetric,
            )
            for i in range(0, len(values), rows)
        ]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    lo, hi = lo.clone(), hi.clone()
    best = quantization_error(values, weight, *qparams(lo, hi), quant_range)
    for move_lo, move_hi in _JOINT if symmetric else _EACH_END:
        start_lo, start_hi = lo.clone(), hi.clone()
        for step in range(1, steps):
            factor = 1 - step / steps
            new_lo = start_lo * factor if move_lo else start_lo
            new_hi = start_hi * factor if move_hi else start_hi
            error = quantization_error(values, weight, *qparams(new_lo, new_hi), quant_range)
            better = error < best
            best = torch.where(better, error, best)
            lo = torch.where(better, new_lo, lo)
            hi = torch.where(better, new_hi, hi)
    return lo, hi
