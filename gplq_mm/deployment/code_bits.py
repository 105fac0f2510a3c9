# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Integer codes of 2 to 8 bits as bytes, and back."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..quantizers.functional import MAX_BITS, MIN_BITS

DENSE_BITS = 4
"""Most bits at which codes share bytes; wider codes have a byte each."""


def packed_size(numel: int, num_bits: int) -> int:
    """Bytes of packed codes.

    Args:
        numel: Number of codes.
        num_bits: Bits per code, 2 to 8.

    Returns:
        ``ceil(numel * num_bits / 8)`` up to 4 bits, else ``numel``.

    Raises:
        ValueError: If ``num_bits`` is not an integer from 2 to 8.

    Examples:
        >>> packed_size(8, 3), packed_size(5, 4), packed_size(5, 6)
        (3, 3, 5)
    """
    _require_bits(num_bits)
    return -(-numel * num_bits // 8) if num_bits <= DENSE_BITS else numel


def pack_codes(codes: Tensor, num_bits: int) -> Tensor:
    """Pack codes densely: code ``i`` has the bits ``[i * num_bits, (i + 1) * num_bits)``.

    Bit 0 is the lowest bit of the first byte. Two 4-bit codes share a byte, the first one in its
    low half; eight 3-bit codes share three bytes; 5 to 8 bits have a byte per code.

    Args:
        codes: Integers from 0 to ``2 ** num_bits - 1``, any shape and dtype; row-major order.
        num_bits: Bits per code, 2 to 8.

    Returns:
        uint8, ``(packed_size(codes.numel(), num_bits),)``.

    Raises:
        ValueError: If ``num_bits`` is not an integer from 2 to 8, or a code is out of range.

    Examples:
        >>> pack_codes(torch.tensor([1, 15, 2]), 4).tolist()
        [241, 2]
        >>> pack_codes(torch.tensor([7, 0, 1]), 3).tolist()  # 0b001_000_111
        [71, 0]
    """
    _require_bits(num_bits)
    flat = codes.reshape(-1)
    if flat.numel() and not (flat.min() >= 0 and flat.max() < 2**num_bits):
        raise ValueError(
            f'codes from {flat.min()} to {flat.max()} do not fit into {num_bits} bits; '
            f'give integers from 0 to {2**num_bits - 1}'
        )
    if num_bits > DENSE_BITS:
        return flat.to(torch.uint8)
    count, size = _group(num_bits)
    groups = flat.new_zeros(-(-flat.numel() // count) * count, dtype=torch.int32)
    groups[: flat.numel()] = flat.int()
    places = torch.arange(count, dtype=torch.int32, device=flat.device) * num_bits
    words = (groups.view(-1, count) << places).sum(1, dtype=torch.int32)
    shifts = torch.arange(size, dtype=torch.int32, device=flat.device) * 8
    data = (words[:, None] >> shifts).bitwise_and_(255).to(torch.uint8)
    return data.view(-1)[: packed_size(flat.numel(), num_bits)].clone()


def unpack_codes(packed: Tensor, num_bits: int, shape: Sequence[int]) -> Tensor:
    """Inverse of ``pack_codes``.

    Args:
        packed: uint8, ``(packed_size(numel, num_bits),)``.
        num_bits: Bits per code, 2 to 8.
        shape: Shape of the codes, with ``numel`` elements.

    Returns:
        uint8 codes of ``shape``.

    Raises:
        ValueError: If ``num_bits`` is not an integer from 2 to 8, or the number of bytes does not
            fit ``shape``.

    Examples:
        >>> unpack_codes(torch.tensor([241, 2], dtype=torch.uint8), 4, (3,)).tolist()
        [1, 15, 2]
    """
    _require_bits(num_bits)
    numel = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.numel() != packed_size(numel, num_bits):
        raise ValueError(
            f'{packed.numel()} elements of {packed.dtype} do not hold {num_bits}-bit codes of '
            f'shape {tuple(shape)}; that takes {packed_size(numel, num_bits)} of torch.uint8'
        )
    if num_bits > DENSE_BITS:
        return packed.reshape(tuple(shape)).clone()
    count, size = _group(num_bits)
    data = packed.new_zeros(-(-packed.numel() // size) * size, dtype=torch.int32)
    data[: packed.numel()] = packed.view(-1).int()
    shifts = torch.arange(size, dtype=torch.int32, device=packed.device) * 8
    words = (data.view(-1, size) << shifts).sum(1, dtype=torch.int32)
    places = torch.arange(count, dtype=torch.int32, device=packed.device) * num_bits
    codes = (words[:, None] >> places).bitwise_and_(2**num_bits - 1).to(torch.uint8)
    return codes.view(-1)[:numel].reshape(tuple(shape))


def _group(num_bits: int) -> tuple[int, int]:
    """Codes and bytes of the smallest group that ends at a byte: ``(8, 3)`` for 3 bits."""
    count = 8 // math.gcd(8, num_bits)
    return count, count * num_bits // 8


def _require_bits(num_bits: int) -> None:
    if not isinstance(num_bits, int) or not MIN_BITS <= num_bits <= MAX_BITS:
        raise ValueError(
            f'num_bits={num_bits!r} is not supported; '
            f'write an integer from {MIN_BITS} to {MAX_BITS}'
        )
