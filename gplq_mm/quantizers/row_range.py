# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Scale and zero point of a vector from its own values (granularity ``PerRow``)."""

import torch
from torch import Tensor

from .functional import positive_scale
from .log_codes import default_levels
from .spec import PerRow, QuantSpec

ROW_SLACK = 0.5
"""A vector's extremes are at the ends of its grid, up to the rounding of the zero point: with this
slack they are in range and get gradients."""


def full_range_share(spec: QuantSpec, levels: Tensor | None = None) -> float:
    """Fraction of a vector's range that one step covers without clipping.

    Args:
        spec: Bits, signedness, symmetry, kind of codes.
        levels: Table of a logarithmic code, ``(2 ** num_bits,)``; the default table if None.

    Examples:
        >>> full_range_share(QuantSpec(num_bits=4, signed=False, granularity=PerRow()))
        0.06666666666666667
    """
    qmin, qmax = spec.quant_range
    if spec.log_code is not None:
        table = default_levels(spec.log_code, spec.num_bits) if levels is None else levels
        return 1.0 / int(table[-1])
    return 1.0 / (qmax if spec.symmetric else qmax - qmin)


@torch.no_grad()
def row_extent(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Extent and middle of the vectors along the spec's axis, which keeps length 1.

    Args:
        x: Values, float32.
        spec: Spec with granularity ``PerRow``.

    Returns:
        ``(extent, middle)``: largest minus smallest value of the range with 0 included, and
        the mean of the two; for a symmetric spec the largest (absolute) value and 0.
    """
    assert isinstance(spec.granularity, PerRow)
    axis = spec.granularity.axis
    if spec.symmetric and not spec.signed:
        high = x.amax(axis, keepdim=True).clamp_min_(0)
        return high, torch.zeros_like(high)
    low, high = (t.contiguous() for t in torch.aminmax(x, dim=axis, keepdim=True))
    low, high = low.clamp_max_(0), high.clamp_min_(0)
    if spec.symmetric:
        high = torch.maximum(high, -low)
        return high, torch.zeros_like(high)
    return high - low, (high + low) * 0.5


def row_zero_point(scale: Tensor, middle: Tensor, spec: QuantSpec) -> Tensor:
    """Zero point that maps the middle of a vector's range to the middle of the codes.

    Args:
        scale: Positive, one per vector.
        middle: Middle from ``row_extent``, same shape.
        spec: Codes.
    """
    qmin, qmax = spec.quant_range
    if spec.symmetric:
        return torch.zeros_like(middle)
    centre = (qmin + qmax) / 2
    return torch.round(centre - middle / scale).clamp_(qmin, qmax)


def row_scale(share: Tensor, extent: Tensor) -> Tensor:
    """Scale of each vector, positive.

    Args:
        share: Stored scale, positive, ``()``.
        extent: Extent from ``row_extent``.
    """
    return positive_scale(share * extent)
