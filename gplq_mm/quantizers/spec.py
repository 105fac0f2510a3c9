# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""What a quantizer is: bits, signedness, symmetry, granularity, observer."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from .functional import integer_range


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor: input ``(...)`` -> scale ``()``."""

    def scale_shape(self, size: int | None) -> tuple[int, ...]:
        """Shape of the stored scale; ``size`` is ignored."""
        return ()


@dataclass(frozen=True)
class PerChannel:
    """One scale an index of ``axis``: input ``(..., C, ...)`` -> scale ``(C,)``.

    Attributes:
        axis: The axis that keeps its own scales. ``-1`` is the channel of a token
            tensor ``(B, N, C)``, ``-3`` the channel of ``(B, C, H, W)``, ``1`` the
            head of ``(B, heads, N, D)``, ``0`` the output channel of a weight.
    """

    axis: int

    def scale_shape(self, size: int | None) -> tuple[int, ...]:
        """Shape of the stored scale for an axis of ``size`` entries.

        Raises:
            ValueError: If ``size`` is not a positive integer.
        """
        if not size or size < 1:
            raise ValueError(f'{self} needs the size of its axis, a positive integer; got {size!r}')
        return (size,)


Granularity = PerTensor | PerChannel


def broadcast_shape(granularity: Granularity, ndim: int) -> tuple[int, ...]:
    """Shape that a stored scale is viewed as, to broadcast over an ``ndim``-D tensor.

    Examples:
        >>> broadcast_shape(PerChannel(axis=1), 4), broadcast_shape(PerTensor(), 4)
        ((1, -1, 1, 1), ())
    """
    if isinstance(granularity, PerTensor):
        return ()
    shape = [1] * ndim
    shape[granularity.axis] = -1
    return tuple(shape)


def reduce_dims(granularity: Granularity, x: torch.Tensor) -> torch.Tensor:
    """View of ``x`` as ``(scales, elements)``; per-tensor gives one row.

    Examples:
        >>> reduce_dims(PerChannel(axis=-1), torch.zeros(2, 5, 3)).shape
        torch.Size([3, 10])
    """
    if isinstance(granularity, PerTensor):
        return x.reshape(1, -1)
    return x.movedim(granularity.axis, 0).reshape(x.shape[granularity.axis], -1)


@dataclass(frozen=True)
class QuantSpec:
    """Everything that fixes a uniform quantizer except its scale values.

    Attributes:
        num_bits: Width of a code in bits, 2 to 8.
        signed: Two's complement codes if True, unsigned if False.
        symmetric: Zero point fixed at code 0 if True, calibrated if False.
        granularity: Which elements share a scale.
        observer: Name of the observer that finds the range (see ``observers``).
        learn_scale: Scale is a parameter (LSQ) if True, a buffer if False.
        observer_args: Keyword arguments of the observer.

    Raises:
        ValueError: If ``num_bits`` is outside 2 to 8.

    Examples:
        >>> QuantSpec(num_bits=4, signed=False).quant_range
        (0, 15)
    """

    num_bits: int = 4
    signed: bool = True
    symmetric: bool = True
    granularity: Granularity = PerTensor()
    observer: str = 'minmax'
    learn_scale: bool = False
    observer_args: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        integer_range(self.num_bits, self.signed)

    @property
    def quant_range(self) -> tuple[int, int]:
        """``(qmin, qmax)``, inclusive."""
        return integer_range(self.num_bits, self.signed)


QuantizerKind = Literal['activation', 'weight']
