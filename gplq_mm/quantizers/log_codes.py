# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Logarithmic codes of values from 0 on, such as attention probabilities.

A code is an index into a table of ``2 ** num_bits`` integers, the *levels*: 0 and the powers of
a base. The value of a code is ``level * scale``, so that a product of such a tensor with integer
codes is an exact integer sum times one factor. The threshold between two levels is their
geometric mean: rounding to nearest on a logarithmic axis.

Source: log2 and log-sqrt2 quantization of attention maps (FQ-ViT, arXiv 2111.13824, section 3.3;
RepQ-ViT, arXiv 2212.08254, equation 12); a searched base (AdaLog, arXiv 2407.12951).
"""

import math

import torch
from torch import Tensor

from .functional import MAX_BITS, MIN_BITS

TOP = 1 << 14
"""Largest level: with 4 bits of ``log2`` the smallest is 1."""
_BASES = {'log2': (2.0,), 'log_sqrt2': (2**0.5,)}
ADALOG_BASES = tuple(2 ** (k / 4) for k in (1, 2, 3, 4, 5, 6, 8))
"""Bases that ``adalog`` chooses from."""
CODES = (*_BASES, 'adalog')
"""Names of the logarithmic codes."""


def log_levels(num_bits: int, base: float) -> Tensor:
    """Levels in ascending order, int32, ``(2 ** num_bits,)``.

    Args:
        num_bits: Width of a code in bits.
        base: Ratio of neighbouring levels, above 1.

    Raises:
        ValueError: If the levels do not fit into distinct integers up to ``TOP``.

    Examples:
        >>> log_levels(3, 2.0).tolist()
        [0, 1, 2, 4, 8, 16, 32, 64]
        >>> log_levels(2, 2**0.5).tolist()
        [0, 8192, 11585, 16384]
    """
    exponents = range(2**num_bits - 2, -1, -1)
    levels = [0, *(round(TOP * base**-j) for j in exponents)]
    if len(set(levels)) < len(levels) or TOP * base ** -(2**num_bits - 2) < 1 - 1e-9:
        raise ValueError(
            f'{num_bits}-bit codes of base {base:.4g} do not fit into distinct integers up to '
            f'{TOP}: the attention product would not be an exact integer sum; write fewer bits, '
            "a smaller base, or codes='uniform'"
        )
    common = math.gcd(*levels)
    return torch.tensor([level // common for level in levels], dtype=torch.int32)


def candidate_bases(codes: str, num_bits: int) -> list[float]:
    """Bases that a code can have at these bits; ``adalog`` has several.

    Examples:
        >>> [round(b, 3) for b in candidate_bases('adalog', 4)]
        [1.189, 1.414, 1.682, 2.0]
    """
    bases = _BASES.get(codes, ADALOG_BASES)
    return [b for b in bases if _fits(num_bits, b)]


def check_codes(codes: str, num_bits: int) -> None:
    """Refuse an unknown code, or bits that it does not support.

    Raises:
        ValueError: If the name is unknown, or the code does not exist at these bits.
    """
    if codes not in CODES:
        raise ValueError(f"codes={codes!r} is unknown; write 'uniform' or one of {CODES}")
    if not candidate_bases(codes, num_bits):
        log_levels(num_bits, _BASES.get(codes, ADALOG_BASES)[0])


def default_levels(codes: str, num_bits: int) -> Tensor:
    """Levels before calibration, see ``log_levels``; the largest base of ``adalog``."""
    return log_levels(num_bits, candidate_bases(codes, num_bits)[-1])


def thresholds(levels: Tensor) -> Tensor:
    """Values at which the code changes, in units of the scale: ``(levels,)``, float32.

    A value has level ``i`` if it is above threshold ``i`` and not above threshold ``i + 1``.
    The first is minus infinity. The threshold between 0 and the smallest level is the next
    midpoint on the logarithmic axis.

    Examples:
        >>> thresholds(torch.tensor([0, 1, 2, 4])).tolist()
        [-inf, 0.7071067690849304, 1.4142135381698608, 2.8284270763397217]
    """
    x = levels.double()
    middle = (x[1:-1] * x[2:]).sqrt()
    first = x[1] * (x[1] / x[2]).sqrt()
    start = torch.full((1,), -math.inf, dtype=torch.float64, device=x.device)
    return torch.cat([start, first[None], middle]).float()


def upper_bound(levels: Tensor) -> Tensor:
    """Upper end of the range, in units of the scale (the next midpoint): ``()``.

    Examples:
        >>> round(float(upper_bound(torch.tensor([0, 1, 2, 4]))), 3)
        5.657
    """
    top, below = levels[-1].double(), levels[-2].double()
    return top * (top / below).sqrt()


def quantize_to_levels(ratio: Tensor, levels: Tensor) -> Tensor:
    """Levels of ``x / scale``, same shape, float32; NaN stays NaN.

    Examples:
        >>> quantize_to_levels(torch.tensor([0.0, 0.9, 3.0]), torch.tensor([0, 1, 2, 4]))
        tensor([0., 1., 4.])
    """
    index = torch.bucketize(ratio.contiguous(), thresholds(levels)[1:].to(ratio.device))
    return levels.to(ratio.dtype)[index].add_(ratio - ratio)


def _fits(num_bits: int, base: float) -> bool:
    try:
        log_levels(num_bits, base)
    except ValueError:
        return False
    return True


LARGEST_LEVEL = {
    (codes, bits): max(int(log_levels(bits, base)[-1]) for base in candidate_bases(codes, bits))
    for codes in CODES
    for bits in range(MIN_BITS, MAX_BITS + 1)
    if candidate_bases(codes, bits)
}
"""Largest level of any table of a code at its bits, without reading a quantizer's table."""
