# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Packing is dense and loses nothing, for every width and size."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gplq_mm.deployment.code_bits import pack_codes, packed_size, unpack_codes

SHAPES = [(), (0,), (1,), (3, 0), (7,), (5, 3), (2, 3, 5, 1), (9, 11)]


@pytest.mark.parametrize('num_bits', range(2, 9))
@pytest.mark.parametrize('shape', SHAPES)
def test_round_trip(num_bits: int, shape: tuple[int, ...]) -> None:
    codes = torch.randint(2**num_bits, shape, generator=torch.Generator().manual_seed(0))
    packed = pack_codes(codes, num_bits)
    again = unpack_codes(packed, num_bits, shape)
    assert again.dtype == packed.dtype == torch.uint8
    assert again.shape == shape
    assert torch.equal(again.long(), codes)
    assert packed.numel() == packed_size(codes.numel(), num_bits)


@given(st.integers(2, 4), st.lists(st.integers(0, 15), max_size=40))
def test_code_i_has_the_bits_from_i_times_num_bits_on(num_bits: int, values: list[int]) -> None:
    codes = [value % 2**num_bits for value in values]
    stream = sum(code << i * num_bits for i, code in enumerate(codes))
    expected = stream.to_bytes(-(-len(codes) * num_bits // 8), 'little')
    assert bytes(pack_codes(torch.tensor(codes), num_bits).tolist()) == expected


def test_codes_in_any_memory_order() -> None:
    codes = torch.arange(12).reshape(3, 4).t()
    assert torch.equal(unpack_codes(pack_codes(codes, 4), 4, (4, 3)).long(), codes)


@pytest.mark.parametrize('bad', [16, -1])
def test_a_code_out_of_range_is_refused(bad: int) -> None:
    with pytest.raises(ValueError, match='4 bits; give integers from 0 to 15'):
        pack_codes(torch.tensor([1, bad]), 4)


@pytest.mark.parametrize('num_bits', [1, 9, 4.0])
def test_other_widths_are_refused(num_bits: int) -> None:
    for call in (lambda b: packed_size(4, b), lambda b: pack_codes(torch.zeros(4), b)):
        with pytest.raises(ValueError, match='write an integer from 2 to 8'):
            call(num_bits)


def test_a_wrong_number_of_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match=r'3-bit codes of shape \(9,\); that takes 4'):
        unpack_codes(torch.zeros(3, dtype=torch.uint8), 3, (9,))
