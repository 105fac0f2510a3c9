# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Observers: compute a quantizer's range from data, equal on one rank or many.

An observer gets ``(scales, elements)`` rows in one or two passes over the
calibration images. Every statistic declares its reduction across ranks
(``reductions``): ``min``, ``max``, ``sum`` of integer counts, or ``gather``
(used in image order). All four are exact, so N ranks on shares of the images
and one rank on all images give bit-equal scales.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from .functional import SCALE_EPS
from .log_codes import candidate_bases, log_levels, quantize_to_levels
from .range_search import search_range
from .row_range import full_range_share, row_extent
from .spec import PerChannel, PerRow, QuantSpec, rows_by_scale

_STEPS, _STEPS_OF_MANY = 80, 40
"""Candidates of a range search, for one scale and for many."""
OBSERVERS: dict[str, type['Observer']] = {}


def register_observer(name: str) -> Callable[[type['Observer']], type['Observer']]:
    """Class decorator: make an observer available as ``QuantSpec(observer=name)``."""

    def add(cls: type['Observer']) -> type['Observer']:
        OBSERVERS[name] = cls
        return cls

    return add


def build_observer(spec: QuantSpec) -> 'Observer':
    """Observer of a spec: the one that it names, or that of its granularity and codes.

    ``PerRow`` scales and logarithmic codes have their own observers.

    Raises:
        ValueError: If no observer has that name.
    """
    if spec.is_log:
        return LogObserver(spec)
    if isinstance(spec.granularity, PerRow):
        return RowObserver(spec)
    if spec.observer not in OBSERVERS:
        raise ValueError(f'observer={spec.observer!r} is unknown; write one of {sorted(OBSERVERS)}')
    return OBSERVERS[spec.observer](spec, **spec.observer_args)


def qparams_from_range(lo: Tensor, hi: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point that cover ``[lo, hi]`` without clipping.

    Args:
        lo: Lower ends, shape ``(scales,)``.
        hi: Upper ends, shape ``(scales,)``.
        spec: Bits, signedness and symmetry.

    Returns:
        ``(scale, zero_point)``, each ``(scales,)``; unsigned symmetric ranges clip
        negative values.

    Examples:
        >>> lo, hi = torch.tensor([-4.0]), torch.tensor([7.0])
        >>> qparams_from_range(lo, hi, QuantSpec(num_bits=4))
        (tensor([1.]), tensor([0.]))
    """
    qmin, qmax = spec.quant_range
    lo, hi = lo.clamp_max(0), hi.clamp_min(0)
    if spec.symmetric:
        scale = hi / qmax
        if spec.signed:
            scale = torch.maximum(scale, lo / qmin)
        return _or_one(scale), torch.zeros_like(scale)
    scale = _or_one((hi - lo) / (qmax - qmin))
    zero_point = torch.round(qmin - lo / scale).clamp(qmin, qmax)
    return scale, zero_point


def _or_one(scale: Tensor) -> Tensor:
    """The scale, or 1 where the range is empty (an all-zero channel stays zero with any scale)."""
    return torch.where(scale > SCALE_EPS, scale, torch.ones_like(scale))


class Observer:
    """Base class: collects statistics and computes scale and zero point."""

    num_passes: ClassVar[int] = 1
    reductions: ClassVar[dict[str, str]] = {}

    def __init__(self, spec: QuantSpec) -> None:
        self.spec = spec
        self.pass_index = 0
        self.num_updates = 0

    def observe(self, x: Tensor) -> None:
        """Add one tensor (any shape that the spec's granularity fits).

        Ignored in a pass that this observer does not need.

        Raises:
            ValueError: If ``x`` holds NaN or infinity.
        """
        if self.pass_index >= self.num_passes:  # another observer needs this pass
            return
        rows = rows_by_scale(self.spec.granularity, x.detach().float())
        if rows.numel() == 0:
            return
        if not torch.isfinite(rows).all():
            raise ValueError('NaN or infinity in the calibrated tensor')
        self.num_updates += 1
        self._update(rows)

    def _update(self, rows: Tensor) -> None:
        raise NotImplementedError

    def neutral(self, how: str, rows: int, device: torch.device) -> Tensor:
        """Neutral element of a reduction, for a rank without data.

        Args:
            how: ``min``, ``max`` or ``sum``.
            rows: Number of scales.
            device: Device of the statistics.

        Returns:
            ``(rows,)``, or ``(rows, bins)`` counts for ``sum``.
        """
        value = {'min': float('inf'), 'max': float('-inf')}[how]
        return torch.full((rows,), value, device=device)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """``(scale, zero_point)``, each ``(scales,)``; call after the last pass."""
        raise NotImplementedError

    def calculate_levels(self) -> Tensor | None:
        """Table of a logarithmic code; None for uniform codes."""
        return None


@register_observer('minmax')
class MinMaxObserver(Observer):
    """Smallest and largest observed value."""

    reductions = {'lo': 'min', 'hi': 'max'}

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__(spec)
        self.lo: Tensor | None = None
        self.hi: Tensor | None = None

    def _update(self, rows: Tensor) -> None:
        lo, hi = rows.amin(1), rows.amax(1)
        self.lo = lo if self.lo is None else torch.minimum(self.lo, lo)
        self.hi = hi if self.hi is None else torch.maximum(self.hi, hi)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Range without clipping."""
        assert self.lo is not None and self.hi is not None
        return qparams_from_range(self.lo, self.hi, self.spec)


@register_observer('moving_average')
class MovingAverageObserver(Observer):
    """Exponential moving average of each update's minimum and maximum.

    Args:
        momentum: Weight of the newest update.
    """

    reductions = {'updates': 'gather'}

    def __init__(self, spec: QuantSpec, momentum: float = 0.1) -> None:
        super().__init__(spec)
        self.momentum = momentum
        self.updates: list[Tensor] = []  # each (2, scales), in image order

    def _update(self, rows: Tensor) -> None:
        self.updates.append(torch.stack([rows.amin(1), rows.amax(1)]))

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Range of the moving average, computed in image order."""
        average = self.updates[0]
        for update in self.updates[1:]:
            average = average + self.momentum * (update - average)
        return qparams_from_range(average[0], average[1], self.spec)


class HistogramObserver(MinMaxObserver):
    """Histogram; the first pass finds its range, the second counts.

    Args:
        bins: Number of bins; the default is 2048 for one scale, 512 for many.
    """

    num_passes = 2
    most_counted: int | None = None
    """Elements per scale that one update counts, evenly spaced; None for all."""

    def __init__(self, spec: QuantSpec, bins: int | None = None) -> None:
        super().__init__(spec)
        self.bins = bins
        self.counts: Tensor | None = None  # (scales, bins) int64

    @property
    def reductions(self) -> dict[str, str]:  # type: ignore[override]
        """Range in the first pass, counts in the second."""
        return {'lo': 'min', 'hi': 'max'} if self.pass_index == 0 else {'counts': 'sum'}

    def _update(self, rows: Tensor) -> None:
        if self.pass_index == 0:
            super()._update(rows)
            return
        assert self.lo is not None and self.hi is not None
        if self.most_counted is not None and len(rows) > 1:
            rows = rows[:, :: max(1, rows.shape[1] // self.most_counted)]
        bins = self._num_bins(len(rows))
        width = ((self.hi - self.lo) / bins)[:, None]
        width = torch.where(width > 0, width, torch.ones_like(width))
        index = ((rows - self.lo[:, None]) / width).long().clamp_(0, bins - 1)
        index += torch.arange(len(rows), device=rows.device)[:, None] * bins
        counts = torch.bincount(index.flatten(), minlength=len(rows) * bins).view(-1, bins)
        self.counts = counts if self.counts is None else self.counts + counts

    def _num_bins(self, rows: int) -> int:
        return self.bins or (2048 if rows == 1 else 512)

    def neutral(self, how: str, rows: int, device: torch.device) -> Tensor:
        """Zero counts for ``sum``, else as in the base class."""
        if how == 'sum':
            return torch.zeros(rows, self._num_bins(rows), dtype=torch.int64, device=device)
        return super().neutral(how, rows, device)

    def centers(self) -> Tensor:
        """Bin centres, ``(scales, bins)``."""
        assert self.lo is not None and self.hi is not None and self.counts is not None
        bins = self.counts.shape[1]
        steps = (torch.arange(bins, device=self.lo.device) + 0.5) / bins
        return self.lo[:, None] + (self.hi - self.lo)[:, None] * steps


@register_observer('percentile')
class PercentileObserver(HistogramObserver):
    """Range between two percentiles of the values.

    Args:
        percentile: Share of the values kept on each side, e.g. 0.99 for the 1st
            and 99th percentile.
        bins: See ``HistogramObserver``.

    Raises:
        ValueError: If ``percentile`` is not in (0.5, 1].
    """

    def __init__(self, spec: QuantSpec, percentile: float = 0.999, bins: int | None = None) -> None:
        super().__init__(spec, bins)
        if not 0.5 < percentile <= 1:
            raise ValueError(f'percentile={percentile} is not in (0.5, 1]; write e.g. 0.999')
        self.percentile = percentile

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Range that clips a share of ``1 - percentile`` at each end."""
        assert self.counts is not None and self.lo is not None and self.hi is not None
        cumulative = self.counts.cumsum(1).double()
        cumulative = cumulative / cumulative[:, -1:]
        bins = self.counts.shape[1]
        width = (self.hi - self.lo) / bins
        first = (cumulative < 1 - self.percentile).sum(1)
        last = (cumulative < self.percentile).sum(1).clamp_max(bins - 1)
        return qparams_from_range(self.lo + first * width, self.lo + (last + 1) * width, self.spec)


@register_observer('mse')
class MSEObserver(HistogramObserver):
    """Range with the least squared quantization error on the histogram."""

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Searches each end of the range, see ``range_search``."""
        assert self.counts is not None and self.lo is not None and self.hi is not None
        weight = self.counts.double()
        weight = (weight / weight.sum(1, keepdim=True)).float()
        lo, hi = search_range(
            self.centers(),
            weight,
            self.lo,
            self.hi,
            lambda a, b: qparams_from_range(a, b, self.spec),
            self.spec.quant_range,
            steps=_STEPS if len(self.lo) == 1 else _STEPS_OF_MANY,
            symmetric=self.spec.symmetric,
        )
        return qparams_from_range(lo, hi, self.spec)


class RowObserver(MinMaxObserver):
    """Observer for ``PerRow``: the grid covers the full range of each vector."""

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Fraction of a vector's range that one step covers, and 0."""
        assert self.lo is not None
        share = torch.full_like(self.lo, full_range_share(self.spec))
        return share, torch.zeros_like(share)


class LogObserver(Observer):
    """Observer for logarithmic codes: the largest value, and the base of ``adalog``.

    The base is the candidate with the least squared error on a histogram of ``log2`` of the
    values; for ``PerRow`` of the values divided by the largest of their vector.
    """

    reductions = {'hi': 'max', 'counts': 'sum'}
    bins_per_octave = 16
    lowest = -32
    octaves = 48

    def __init__(self, spec: QuantSpec) -> None:
        if isinstance(spec.granularity, PerChannel):
            raise ValueError(
                f'codes={spec.codes!r} have one scale per tensor or per row: write '
                "granularity='per_row'"
            )
        super().__init__(spec)
        self.hi: Tensor | None = None
        self.counts: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        """As in the base class."""
        if isinstance(self.spec.granularity, PerRow) and x.numel():
            x = x.detach().float()
            extent = row_extent(x, self.spec)[0]
            x = x / torch.where(extent > 0, extent, torch.ones_like(extent))
        super().observe(x)

    def _update(self, rows: Tensor) -> None:
        hi = rows.amax(1)
        self.hi = hi if self.hi is None else torch.maximum(self.hi, hi)
        if self.spec.codes != 'adalog':
            counts = self.neutral('sum', 1, rows.device)
        else:
            octave = (rows.clamp_min(2.0**self.lowest).log2() - self.lowest).flatten()
            index = (octave * self.bins_per_octave).long().clamp_(0, self._bins - 1)
            counts = torch.bincount(index, minlength=self._bins)[None]
        self.counts = counts if self.counts is None else self.counts + counts

    @property
    def _bins(self) -> int:
        return self.bins_per_octave * self.octaves

    def neutral(self, how: str, rows: int, device: torch.device) -> Tensor:
        """Zero counts for ``sum``, else as in the base class."""
        if how == 'sum':
            return torch.zeros(rows, self._bins, dtype=torch.int64, device=device)
        return super().neutral(how, rows, device)

    def calculate_levels(self) -> Tensor | None:
        """Levels of the best base; None if the spec has uniform codes at its bits."""
        spec = self.spec
        if spec.log_code is None:
            return None
        bases = candidate_bases(spec.log_code, spec.num_bits)
        if len(bases) == 1:
            return log_levels(spec.num_bits, bases[0])
        tables = [log_levels(spec.num_bits, base) for base in bases]
        return tables[int(torch.stack([self._error(t) for t in tables]).argmin())]

    def _error(self, levels: Tensor) -> Tensor:
        """Squared error on the histogram."""
        assert self.counts is not None
        steps = (torch.arange(self._bins, dtype=torch.float64) + 0.5) / self.bins_per_octave
        values = torch.exp2(steps + self.lowest)
        scale = self._top() / float(levels[-1])
        error = quantize_to_levels(values / scale, levels) * scale - values
        return (self.counts[0].cpu() * error.square()).sum()

    def _top(self) -> float:
        assert self.hi is not None
        return 1.0 if isinstance(self.spec.granularity, PerRow) else float(self.hi)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale that gives the largest value the largest level, and 0."""
        assert self.hi is not None
        share = full_range_share(self.spec, self.calculate_levels())
        scale = torch.full_like(self.hi, self._top() * share)
        return _or_one(scale), torch.zeros_like(scale)
