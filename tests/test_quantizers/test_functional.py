# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gplq_mm.quantizers.functional import (
    SCALE_EPS,
    dequantize,
    integer_range,
    positive_scale,
    quantize,
    sum_to_shape,
)
from tests.helpers.reference import BITS, bounds, int_codes

SHAPES = [(1,), (7,), (1, 13), (2, 3, 5), (3, 1, 2, 11), (0, 5)]


@st.composite
def problems(draw):
    """A tensor, its scale and zero point (per-tensor or on one axis), and bounds."""
    low, high = bounds(draw(st.integers(2, 8)), draw(st.booleans()))
    shape = draw(st.sampled_from(SHAPES))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale_shape = [1] * len(shape)
    if draw(st.booleans()):
        axis = draw(st.integers(0, len(shape) - 1))
        scale_shape[axis] = shape[axis]
    magnitude = 10.0 ** draw(st.integers(-4, 3))
    scale = (torch.rand(scale_shape, generator=rng) + 0.1) * magnitude
    zero_point = torch.randint(low, high + 1, scale_shape, generator=rng).float()
    steps = torch.randn(shape, generator=rng) * (high - low)
    if draw(st.booleans()):  # exact ties between two codes
        steps = steps.round() + 0.5
    return steps * scale, scale, zero_point, low, high


@pytest.mark.parametrize('num_bits', BITS)
@pytest.mark.parametrize('signed', [True, False])
def test_integer_range_has_all_codes_of_its_width(num_bits, signed):
    low, high = integer_range(num_bits, signed)
    assert (low, high) == bounds(num_bits, signed)
    assert high - low + 1 == 2**num_bits


@pytest.mark.parametrize('num_bits', [1, 0, -4, 9, 16, 4.0, '4', None, True])
def test_other_bits_are_refused_with_the_value_and_the_allowed_ones(num_bits):
    with pytest.raises(ValueError, match=r'num_bits=.*from 2 to 8') as error:
        integer_range(num_bits, True)
    assert repr(num_bits) in str(error.value)


@given(problems())
def test_codes_equal_the_integer_reference(problem):
    x, scale, zero_point, low, high = problem
    codes = quantize(x, scale, zero_point, low, high)
    assert codes.dtype == x.dtype and codes.shape == x.shape
    assert np.array_equal(codes.numpy().astype(np.int64), int_codes(*problem))


@given(problems())
def test_values_equal_the_integer_reference_bit_for_bit(problem):
    _, scale, zero_point, *_ = problem
    values = dequantize(quantize(*problem), scale, zero_point)
    expected = (int_codes(*problem) - zero_point.numpy().astype(np.int64)).astype(np.float32)
    assert np.array_equal(values.numpy(), expected * scale.numpy())


@given(problems())
def test_quantizing_twice_changes_nothing(problem):
    _, scale, zero_point, low, high = problem
    once = dequantize(quantize(*problem), scale, zero_point)
    twice = dequantize(quantize(once, scale, zero_point, low, high), scale, zero_point)
    assert torch.equal(once, twice)


@given(st.integers(2, 8), st.booleans(), st.floats(1e-6, 1e4), st.data())
def test_every_grid_point_is_a_fixed_point_and_zero_is_on_the_grid(bits, signed, step, data):
    low, high = bounds(bits, signed)
    scale, zero_point = torch.tensor(step), torch.tensor(float(data.draw(st.integers(low, high))))
    codes = torch.arange(low, high + 1).float()
    grid = dequantize(codes, scale, zero_point)
    assert torch.equal(quantize(grid, scale, zero_point, low, high), codes)
    assert (grid == 0).sum() == 1


@pytest.mark.parametrize('num_bits', BITS)
def test_no_more_levels_than_the_width_allows(num_bits):
    low, high = bounds(num_bits, True)
    values = quantize(
        torch.linspace(-1e3, 1e3, 20000), torch.tensor(0.7), torch.tensor(1.0), low, high
    )
    assert len(values.unique()) == 2**num_bits


def test_huge_values_clamp():
    x = torch.tensor([1e30, -1e30, float('inf'), float('-inf')])
    codes = quantize(x, torch.tensor(1e-3), torch.tensor(0.0), -8, 7)
    assert codes.tolist() == [7, -8, 7, -8]


def test_the_input_is_left_alone_and_may_be_non_contiguous():
    x = torch.randn(5, 3, 2)
    kept = x.clone()
    codes = quantize(x.transpose(0, 2), torch.tensor(0.3), torch.tensor(0.0), -8, 7)
    assert torch.equal(x, kept)
    assert torch.equal(codes.transpose(0, 2), quantize(x, *map(torch.tensor, (0.3, 0.0)), -8, 7))


def test_a_scale_never_reaches_zero():
    assert positive_scale(torch.tensor([-1.0, 0.0, 2.0])).tolist() == pytest.approx(
        [SCALE_EPS, SCALE_EPS, 2.0]
    )


def test_sum_to_shape_sums_the_broadcast_dimensions():
    x = torch.randn(2, 3, 4)
    assert torch.allclose(sum_to_shape(x, torch.Size([3, 1])), x.sum((0, 2))[:, None])
    assert torch.allclose(sum_to_shape(x, torch.Size([])), x.sum())
