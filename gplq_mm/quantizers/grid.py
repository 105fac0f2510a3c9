# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Codes of a quantizer, and how it applies to one tensor."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .functional import positive_scale
from .row_range import ROW_SLACK, row_extent, row_scale, row_zero_point
from .spec import QuantSpec


class Grid(NamedTuple):
    """Codes allowed, and which values are in range.

    Attributes:
        qmin: Smallest code.
        qmax: Largest code.
        zero_point: Code of real zero: a number, or a tensor that broadcasts.
        slack: Steps by which a value may lie outside the codes and still be in range; 0 as in
            LSQ, 0.5 where the grid follows the values (``PerRow``).
        levels: Table of integers of a logarithmic code; None for uniform codes.
    """

    qmin: int
    qmax: int
    zero_point: float | Tensor
    slack: float = 0.0
    levels: Tensor | None = None

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
        low, high = self.qmin - self.zero_point, self.qmax - self.zero_point
        return low - self.slack, high + self.slack


class Steps(NamedTuple):
    """Scale and codes of one tensor.

    Attributes:
        scale: Positive, broadcasts to the tensor.
        grid: Codes allowed.
    """

    scale: Tensor
    grid: Grid


class Operand(NamedTuple):
    """How a quantizer applies to one tensor; its scale parameter is passed beside it.

    Attributes:
        grid: Codes allowed.
        shape: Shape in which the scale broadcasts to the tensor.
        factor: What LSQ multiplies the scale's gradient by.
        rows: Spec of a quantizer whose scale follows each vector (``PerRow``), else None.
    """

    grid: Grid
    shape: tuple[int, ...]
    factor: float
    rows: QuantSpec | None = None

    def steps(self, x: Tensor, parameter: Tensor) -> Steps:
        """Scale and codes for a tensor.

        Args:
            x: The tensor, float32.
            parameter: Scale of the quantizer.
        """
        share = positive_scale(parameter)
        if self.rows is None:
            return Steps(share.view(self.shape), self.grid)
        extent, middle = row_extent(x, self.rows)
        scale = row_scale(share, extent)
        if self.rows.symmetric:
            return Steps(scale, self.grid)
        zero_point = row_zero_point(scale, middle, self.rows)
        return Steps(scale, self.grid._replace(zero_point=zero_point))

    def kept(self, steps: Steps) -> tuple[Tensor | None, Tensor | None]:
        """What a backward pass keeps of ``steps``: nothing that the parameter gives again."""
        zero_point = steps.grid.zero_point
        if self.rows is None:
            return None, None
        return steps.scale, zero_point if isinstance(zero_point, Tensor) else None

    def kept_steps(self, kept: Sequence[Tensor | None], parameter: Tensor) -> Steps:
        """Inverse of ``kept``."""
        scale, zero_point = kept
        if scale is None:
            return Steps(positive_scale(parameter).view(self.shape), self.grid)
        grid = self.grid if zero_point is None else self.grid._replace(zero_point=zero_point)
        return Steps(scale, grid)

    def gradient(self, grad: Tensor | None, parameter: Tensor, scale: Tensor) -> Tensor | None:
        """Gradient of the parameter from that of the scale as it broadcast.

        Args:
            grad: Gradient of ``Steps.scale``, its shape.
            parameter: Scale of the quantizer.
            scale: ``Steps.scale``.
        """
        if grad is None:
            return None
        if self.rows is not None:  # scale = parameter * extent of the vector
            share = positive_scale(parameter)
            return torch.sum(grad * scale).div_(share).mul_(self.factor).view(parameter.shape)
        return grad.mul(self.factor).view(parameter.shape)


def row_grid(grid: Grid) -> Grid:
    """The grid of a quantizer whose scale follows each vector."""
    return grid._replace(slack=ROW_SLACK)
