# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Distribution of a layer's weights before rounding, in steps of its grid."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops import QuantizedLayer, weight_rows
from ..quantizers.functional import positive_scale
from .weight_error import LayerResult

WORST, BINS = 10, 96
"""Layers that get a histogram, and bins of each."""
MARGIN = 0.5
"""Part of the grid's width that a histogram shows beyond each end."""


def worst_layers(layers: Mapping[str, LayerResult], count: int = WORST) -> list[str]:
    """Names of the layers with the lowest weight SQNR, the worst first.

    Examples:
        >>> found = {'a': LayerResult(4, 0.1, 20.0), 'b': LayerResult(4, 0.2, 10.0)}
        >>> worst_layers({**found, 'exact': LayerResult(4, 0.0, None)})
        ['b', 'a']
    """
    found = {n: r.weight_sqnr_db for n, r in layers.items() if r.weight_sqnr_db is not None}
    return sorted(found, key=lambda name: found[name])[:count]


@torch.no_grad()
def weight_histogram(layer: QuantizedLayer, float_weight: Tensor) -> dict[str, Any]:
    """Histogram of ``weight / scale + zero_point``: the grid lies at the integers.

    A scale per output channel gives each row a grid of its own; in steps all rows share one axis.

    Args:
        layer: Layer after stage 2.
        float_weight: Its stage-1 weight, not folded; shape of ``layer.weight``.

    Returns:
        ``qmin`` and ``qmax``; ``low``, ``high`` and ``counts``: equal bins between two numbers of
        steps, the outermost with everything beyond; ``clipped``: share of the weights that lie
        more than half a step beyond the grid.
    """
    quantizer = layer.weight_quantizer
    scale = positive_scale(quantizer.scale).reshape(-1, 1)
    steps = weight_rows(layer, float_weight) / scale + quantizer.zero_point.reshape(-1, 1)
    qmin, qmax = quantizer.spec.quant_range
    low, high = _shown(steps, qmin, qmax)
    inside = steps.clamp(low, high).float().cpu()
    counts = torch.histc(inside, BINS, low, high)
    clipped = ((steps < qmin - 0.5) | (steps > qmax + 0.5)).double().mean()
    return {
        'qmin': qmin,
        'qmax': qmax,
        'low': low,
        'high': high,
        'counts': [int(count) for count in counts],
        'clipped': float(clipped),
    }


def _shown(steps: Tensor, qmin: int, qmax: int) -> tuple[float, float]:
    """Ends of the axis: the grid with half a step, and what lies little beyond it."""
    margin = MARGIN * (qmax - qmin)
    low = max(float(steps.min()), qmin - margin)
    high = min(float(steps.max()), qmax + margin)
    return min(low, qmin - 0.5), max(high, qmax + 0.5)
