# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Weight error of stage 2."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import QuantizedLayer, weight_rows


@dataclass
class LayerResult:
    """Error of one layer's weight, with the input scale folded in.

    Attributes:
        num_bits: Bits of a weight code.
        weight_mse: Mean squared error.
        weight_sqnr_db: Signal to quantization noise ratio in dB; None without noise.
    """

    num_bits: int
    weight_mse: float
    weight_sqnr_db: float | None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a JSON report."""
        return asdict(self)


@torch.no_grad()
def measure_weight_error(
    layer: QuantizedLayer, float_weight: Tensor, input_factor: Tensor | None = None
) -> LayerResult:
    """Compare a layer's on-grid weight with its stage-1 weight.

    Args:
        layer: Layer after stage 2.
        float_weight: Stage-1 weight, not folded.
        input_factor: Factors applied to its columns before rounding, ``(in_features,)``; the
            error is that of the original columns. None for no factors.
    """
    columns = 1.0 if input_factor is None else input_factor.double()
    signal = weight_rows(layer, float_weight).double() / columns
    noise = (weight_rows(layer).double() / columns - signal).square().sum()
    power = signal.square().sum()
    sqnr = None
    if noise > 0 and power > 0:
        sqnr = round(float(10 * torch.log10(power / noise)), 3)
    mse = float(noise) / max(signal.numel(), 1)
    return LayerResult(layer.weight_quantizer.spec.num_bits, mse, sqnr)


def mean_weight_mse(layers: Mapping[str, LayerResult]) -> float:
    """Mean over the layers of their mean squared weight error.

    Examples:
        >>> mean_weight_mse({'a': LayerResult(4, 0.25, 20.0), 'b': LayerResult(4, 0.5, 10.0)})
        0.375
    """
    return sum(r.weight_mse for r in layers.values()) / max(len(layers), 1)


def summarize(layers: Mapping[str, LayerResult]) -> dict[str, Any]:
    """``mean_sqnr_db``, and ``min_sqnr_db`` with its ``worst_layer``; None without noise.

    Examples:
        >>> summarize({'a': LayerResult(4, 0.1, 20.0), 'b': LayerResult(4, 0.2, 10.0)})
        {'mean_sqnr_db': 15.0, 'min_sqnr_db': 10.0, 'worst_layer': 'b'}
    """
    found = {n: r.weight_sqnr_db for n, r in layers.items() if r.weight_sqnr_db is not None}
    if not found:
        return {'mean_sqnr_db': None, 'min_sqnr_db': None, 'worst_layer': None}
    worst = min(found, key=lambda name: found[name])
    return {
        'mean_sqnr_db': round(sum(found.values()) / len(found), 3),
        'min_sqnr_db': found[worst],
        'worst_layer': worst,
    }
