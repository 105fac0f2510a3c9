# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""QuantSpec: bits, signedness, symmetry, granularity and observer of a quantizer."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch

from .functional import integer_range
from .log_codes import check_codes

AUTO_LOG_BITS = 4
"""Most bits at which ``codes='auto'`` is ``log2``: its levels still fit into integers."""


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor: input ``(...)`` -> scale ``()``."""

    def scale_shape(self, size: int | None) -> tuple[int, ...]:
        """Shape of the stored scale; ``size`` is ignored."""
        return ()


@dataclass(frozen=True)
class PerChannel:
    """One scale per index of ``axis``: input ``(..., C, ...)`` -> scale ``(C,)``.

    Attributes:
        axis: The axis with a scale per index. ``-1`` is the channel of a token
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


@dataclass(frozen=True)
class PerRow:
    """One scale per vector along ``axis``, computed from the vector when it is quantized.

    Input ``(..., K)`` -> stored scale ``()``: the fraction of a vector's own range (its
    largest value, or largest minus smallest) that one step of the grid covers. No range is
    stored, so long softmax rows and tokens of different magnitude keep their resolution. In
    a matrix product the axis has to be the summed one: only then can the vector's scale be
    factored out of the integer sum.

    Attributes:
        axis: ``-1`` for a left operand ``(..., N, K)``, ``-2`` for a right one ``(..., K, M)``.
    """

    axis: int = -1

    def scale_shape(self, size: int | None) -> tuple[int, ...]:
        """Shape of the stored scale; ``size`` is ignored."""
        return ()


Granularity = PerTensor | PerChannel | PerRow


def rows_by_scale(granularity: Granularity, x: torch.Tensor) -> torch.Tensor:
    """View of ``x`` as ``(scales, elements)``; per-tensor gives one row.

    Examples:
        >>> rows_by_scale(PerChannel(axis=-1), torch.zeros(2, 5, 3)).shape
        torch.Size([3, 10])
    """
    if not isinstance(granularity, PerChannel):
        return x.reshape(1, -1)
    return x.movedim(granularity.axis, 0).reshape(x.shape[granularity.axis], -1)


@dataclass(frozen=True)
class QuantSpec:
    """All settings of a quantizer; scale and zero point are its state.

    Attributes:
        num_bits: Width of a code in bits, 2 to 8.
        signed: Two's complement codes if True, unsigned if False.
        symmetric: Zero point fixed at code 0 if True, calibrated if False.
        granularity: Which elements share a scale.
        observer: Name of the observer that computes the range (see ``observers``).
        learn_scale: Scale is a parameter (LSQ) if True, a buffer if False.
        observer_args: Keyword arguments of the observer.
        codes: ``uniform``, a logarithmic code of ``log_codes.CODES`` for values from 0 on, or
            ``auto``: ``log2`` up to 4 bits, ``uniform`` above.

    Raises:
        ValueError: If ``num_bits`` is outside 2 to 8, or ``codes`` is unknown, signed, or
            cannot be integers at these bits.

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
    codes: str = 'uniform'

    def __post_init__(self) -> None:
        integer_range(self.num_bits, self.signed)
        if self.is_log:
            check_codes(self.log_code or '', self.num_bits)
            if self.signed or not self.symmetric:
                raise ValueError(
                    f'codes={self.codes!r} represent values from 0 on: write signed=False and '
                    'symmetric=True'
                )

    @cached_property
    def log_code(self) -> str | None:
        """Name of the logarithmic code; None for uniform codes."""
        if self.codes == 'auto':
            return 'log2' if self.num_bits <= AUTO_LOG_BITS else None
        return None if self.codes == 'uniform' else self.codes

    @cached_property
    def is_log(self) -> bool:
        """Whether the codes are logarithmic."""
        return self.log_code is not None

    @cached_property
    def quant_range(self) -> tuple[int, int]:
        """``(qmin, qmax)``, inclusive."""
        return integer_range(self.num_bits, self.signed)


QuantizerKind = Literal['activation', 'weight']
