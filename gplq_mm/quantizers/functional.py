# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Pure functions of uniform quantization: codes and values.

Conventions: ``code = clamp(round(x / scale) + zero_point, qmin, qmax)`` is an
integer (held in a float tensor), the *centred* code is ``code - zero_point``, and
the dequantized value is ``centred * scale``. Real zero is always on the grid.
"""

from functools import partial

import torch
from torch import Tensor

MIN_BITS, MAX_BITS = 2, 8
SCALE_EPS = 1e-9
"""Smallest scale: a learned scale must not reach zero or change its sign."""


def integer_range(num_bits: int, signed: bool) -> tuple[int, int]:
    """Smallest and largest integer code.

    Args:
        num_bits: Width of the code in bits, 2 to 8.
        signed: Two's complement codes if True, else codes from 0 on.

    Returns:
        ``(qmin, qmax)``, both inclusive.

    Raises:
        ValueError: If ``num_bits`` is not an integer from 2 to 8.

    Examples:
        >>> integer_range(4, signed=True), integer_range(4, signed=False)
        ((-8, 7), (0, 15))
    """
    if not isinstance(num_bits, int) or not MIN_BITS <= num_bits <= MAX_BITS:
        raise ValueError(
            f'num_bits={num_bits!r} is not supported; '
            f'write an integer from {MIN_BITS} to {MAX_BITS}'
        )
    if signed:
        return -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1
    return 0, 2**num_bits - 1


positive_scale = partial(torch.clamp_min, min=SCALE_EPS)
"""``positive_scale(scale)``: scale bounded below by ``SCALE_EPS``, shape unchanged."""


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """Integer codes of ``x``.

    Args:
        x: Real values, any shape.
        scale: Step size, broadcastable to ``x``.
        zero_point: Code of real zero, broadcastable to ``x``.
        qmin: Smallest code.
        qmax: Largest code.

    Returns:
        Codes in ``[qmin, qmax]``, shape and dtype of ``x``.

    Examples:
        >>> x = torch.tensor([-1.0, 0.26, 9.0])
        >>> quantize(x, torch.tensor(0.5), torch.tensor(0.0), -8, 7)
        tensor([-2.,  1.,  7.])
    """
    return (x / positive_scale(scale)).round_().add_(zero_point).clamp_(qmin, qmax)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Real values of integer codes, ``(codes - zero_point) * scale``.

    Examples:
        >>> dequantize(torch.tensor([3.0]), torch.tensor(0.5), torch.tensor(1.0))
        tensor([1.])
    """
    return (codes - zero_point) * positive_scale(scale)


def sum_to_shape(x: Tensor, shape: torch.Size) -> Tensor:
    """Sum ``x`` over the broadcast dimensions so that it has ``shape``.

    Examples:
        >>> sum_to_shape(torch.ones(2, 3), torch.Size([3]))
        tensor([2., 2., 2.])
    """
    return x.sum_to_size(shape)
