# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Grid: the codes of a quantizer, without its scale."""

from typing import NamedTuple

from torch import Tensor


class Grid(NamedTuple):
    """Integer grid of a quantizer.

    Attributes:
        qmin: Smallest code.
        qmax: Largest code.
        zero_point: Code of real zero: a number, or a tensor that broadcasts.
    """

    qmin: int
    qmax: int
    zero_point: float | Tensor

    @property
    def is_narrow(self) -> bool:
        """Whether a code fits half a byte."""
        return self.qmax - self.qmin < 16

    @property
    def offset(self) -> int:
        """What is added to a code so that it fits a signed half byte or byte."""
        if self.qmin < 0:
            return 0
        return -8 if self.is_narrow else -128

    @property
    def bounds(self) -> tuple[float | Tensor, float | Tensor]:
        """Exclusive bounds of ``x / scale``."""
        return self.qmin - self.zero_point, self.qmax - self.zero_point
