# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Grid and Operand: the codes of a quantizer, and how its scale applies to one tensor."""

from typing import NamedTuple

from torch import Tensor

from .functional import positive_scale


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


class Operand(NamedTuple):
    """How a quantizer applies to one tensor; its scale parameter is passed beside it.

    Attributes:
        grid: Codes allowed.
        shape: Shape in which the scale broadcasts to the tensor.
        factor: What LSQ multiplies the scale's gradient by.
    """

    grid: Grid
    shape: tuple[int, ...]
    factor: float

    def scale(self, parameter: Tensor) -> Tensor:
        """Positive scale that broadcasts to the tensor."""
        return positive_scale(parameter).view(self.shape)

    def gradient(self, grad: Tensor | None, parameter: Tensor) -> Tensor | None:
        """Gradient of the parameter from that of the scale as it broadcast."""
        return None if grad is None else grad.mul(self.factor).view(parameter.shape)
