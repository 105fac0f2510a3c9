# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Weight ranges for algorithms that do their own rounding."""

import torch
from torch import Tensor

from ...ops import QuantizedLayer
from ...quantizers import qparams_from_range
from ...quantizers.range_search import search_range
from ...quantizers.spec import rows_by_scale
from ..algorithms import WEIGHT_PTQ
from ..task import RangePTQ, folded

RANGES = ('mse', 'percentile', 'minmax')


def check_range(where: str, name: str | None, allowed: tuple[str, ...] = RANGES) -> None:
    """Refuse an unknown range.

    Raises:
        ValueError: If ``name`` is neither None nor one of ``allowed``.
    """
    if name is not None and name not in allowed:
        raise ValueError(f'{where} range={name!r}: write one of {allowed}')


@torch.no_grad()
def set_range(
    layer: QuantizedLayer, weight: Tensor, name: str, importance: Tensor | None = None
) -> None:
    """Set the scale of a layer's weight quantizer from its weights.

    Args:
        layer: The layer.
        weight: Float weight, not folded.
        name: One of ``RANGES``, or ``hessian`` for the least squared error weighted by
            ``importance``.
        importance: Weight per element, shape of ``weight``.
    """
    spec = layer.weight_quantizer.spec
    rows = rows_by_scale(spec.granularity, folded(layer, weight))
    if name == 'hessian' and importance is not None:
        lo, hi = search_range(
            rows,
            rows_by_scale(spec.granularity, importance),
            rows.amin(1),
            rows.amax(1),
            lambda a, b: qparams_from_range(a, b, spec),
            spec.quant_range,
            symmetric=spec.symmetric,
        )
        layer.weight_quantizer.set_qparams(*qparams_from_range(lo, hi, spec))
        return
    algorithm = WEIGHT_PTQ[name]()
    assert isinstance(algorithm, RangePTQ)
    layer.weight_quantizer.set_qparams(*algorithm.calculate_qparams(rows, spec))
