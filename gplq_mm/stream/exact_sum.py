# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Sums of floating-point numbers that do not depend on the order of the terms."""

import torch
import torch.distributed as dist
from torch import Tensor

from .distributed import all_reduce_sum, world

_QUANTA = (2.0**20, 2.0**-20, 2.0**-60)
"""Each term is split into integer multiples of these; multiples add without rounding."""
_FIXED = 2.0**40
"""``FixedPointSum`` counts multiples of its inverse."""


class ExactSum:
    """Running float64 sum, bit-equal for every order and every split over ranks.

    A term is split at fixed binary places into three parts, and float64 adds the
    parts without rounding as long as no sum of parts needs more than 53 bits: up to
    2^13 terms below 2^72. Digits below 2^-61 are dropped.

    Source: pre-rounding as in Demmel and Nguyen, "Fast reproducible floating-point
    summation" (ARITH 2013), with fixed instead of data-dependent places.

    Args:
        shape: Shape of a term.
        device: Device of the sum.

    Examples:
        >>> total = ExactSum((1,), torch.device('cpu'))
        >>> for term in (1e12, 0.1, -1e12):
        ...     total.add(torch.tensor([term], dtype=torch.float64))
        >>> total.value()
        tensor([0.1000], dtype=torch.float64)
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.parts = torch.zeros((len(_QUANTA), *shape), dtype=torch.float64, device=device)

    def add(self, term: Tensor) -> None:
        """Add one float64 term of the sum's shape."""
        rest = term
        for part, quantum in zip(self.parts, _QUANTA, strict=True):
            cut = torch.round(rest / quantum).mul_(quantum)
            part += cut
            rest = rest - cut

    def reduce(self) -> None:
        """Sum over all ranks; does nothing without a process group."""
        if world()[1] > 1:
            dist.all_reduce(self.parts)

    def value(self) -> Tensor:
        """The sum, float64."""
        return self.parts[0] + (self.parts[1] + self.parts[2])


class FixedPointSum:
    """Running sum of small numbers such as gradients, in a third of the memory of ``ExactSum``.

    Each term is rounded to a multiple of 2^-40; sums below 2^13 are bit-equal for every order and
    every split over ranks.

    Args:
        shape: Shape of a term.
        device: Device of the sum.

    Examples:
        >>> total = FixedPointSum((1,), torch.device('cpu'))
        >>> for term in (0.1, 3.0, -0.1):
        ...     total.add(torch.tensor([term]))
        >>> total.value()
        tensor([3.], dtype=torch.float64)
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.multiples = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, term: Tensor) -> None:
        """Add one term of the sum's shape."""
        self.multiples += (term.double() * _FIXED).round_()

    def reduce(self) -> None:
        """Sum over all ranks; does nothing without a process group."""
        all_reduce_sum(self.multiples)

    def value(self) -> Tensor:
        """The sum, float64."""
        return self.multiples / _FIXED

    def clear(self) -> None:
        """Begin a new sum."""
        self.multiples.zero_()
