# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from gplq_mm.quantizers import PerRow, QuantSpec
from gplq_mm.quantizers.log_codes import default_levels, quantize_to_levels
from gplq_mm.quantizers.row_range import (
    full_range_share,
    row_extent,
    row_scale,
    row_zero_point,
)
from tests.helpers.reference import SCHEMES, bounds

SHAPES = [(1, 1, 1), (3, 1, 7), (2, 5, 13), (4, 17, 1)]
CASES = {
    'bits': st.integers(2, 8),
    'scheme': st.sampled_from(SCHEMES),
    'axis': st.sampled_from([-1, -2]),
    'shape': st.sampled_from(SHAPES),
    'shift': st.floats(-8, 8, width=32),
    'seed': st.integers(0, 10**6),
}


def sample(shape, shift, seed):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp(torch.randn(shape[0], 1, 1, generator=generator) * 4)
    return (torch.randn(shape, generator=generator) + shift) * spread


def grid_of(x, spec):
    extent, middle = row_extent(x, spec)
    scale = row_scale(torch.tensor(full_range_share(spec)), extent)
    return scale, row_zero_point(scale, middle, spec)


@given(**CASES)
def test_nothing_of_a_vector_is_clipped(bits, scheme, axis, shape, shift, seed):
    spec = QuantSpec(bits, *scheme, granularity=PerRow(axis))
    x = sample(shape, shift, seed)
    if scheme == (False, True):
        x = x.abs()
    scale, zero_point = grid_of(x, spec)
    low, high = bounds(bits, scheme[0])
    kept = [1 if d == x.dim() + axis else n for d, n in enumerate(shape)]
    assert list(scale.shape) == list(zero_point.shape) == kept
    assert (scale > 0).all() and torch.equal(zero_point, zero_point.round())
    assert ((zero_point >= low) & (zero_point <= high)).all()
    assert not spec.symmetric or (zero_point == 0).all()
    code = torch.round(x / scale) + zero_point
    assert ((code >= low - 1) & (code <= high + 1)).all()
    back = (code.clamp(low, high) - zero_point) * scale
    # half a step of rounding, half a step of the zero point
    assert ((back - x).abs() <= 1.001 * scale).all()


@given(**CASES, factor=st.sampled_from([2.0**-10, 0.25, 8.0, 2.0**20]))
def test_codes_do_not_depend_on_the_size_of_a_vector(
    bits, scheme, axis, shape, shift, seed, factor
):
    spec = QuantSpec(bits, *scheme, granularity=PerRow(axis))
    x = sample(shape, shift, seed) + 1e-3
    assume((row_extent(x, spec)[0] > 1e-3).all())
    scale, zero_point = grid_of(x, spec)
    scaled, same_zero_point = grid_of(x * factor, spec)
    assert torch.equal(scaled, scale * factor) and torch.equal(zero_point, same_zero_point)


@pytest.mark.parametrize('axis', [-1, -2])
@pytest.mark.parametrize('scheme', SCHEMES)
def test_one_vector_does_not_see_another(scheme, axis):
    spec = QuantSpec(4, *scheme, granularity=PerRow(axis))
    x = torch.randn(3, 5, 7)
    whole = grid_of(x, spec)
    alone = [grid_of(x[i : i + 1], spec) for i in range(3)]
    for index, values in enumerate(whole):
        assert torch.equal(values, torch.cat([a[index] for a in alone]))


@pytest.mark.parametrize('scheme', SCHEMES)
def test_a_vector_of_zeros_stays_zero(scheme):
    spec = QuantSpec(4, *scheme, granularity=PerRow(-1))
    x = torch.stack([torch.zeros(6), torch.linspace(-1, 1, 6)])
    scale, zero_point = grid_of(x, spec)
    assert (scale > 0).all() and torch.isfinite(scale).all() and torch.isfinite(zero_point).all()
    assert (torch.round(x[0] / scale[0]) == 0).all()


@pytest.mark.parametrize(('signed', 'symmetric'), SCHEMES)
def test_extent_and_middle_by_hand(signed, symmetric):
    spec = QuantSpec(4, signed, symmetric, granularity=PerRow(-1))
    extent, middle = row_extent(torch.tensor([[1.0, -5.0, 3.0], [2.0, 4.0, 1.0]]), spec)
    if symmetric:
        assert extent.flatten().tolist() == ([5.0, 4.0] if signed else [3.0, 4.0])
        assert middle.flatten().tolist() == [0.0, 0.0]
    else:  # both ranges taken with 0
        assert extent.flatten().tolist() == [8.0, 4.0]
        assert middle.flatten().tolist() == [-1.0, 2.0]


def test_the_range_of_a_tensor_of_the_graph_is_a_constant():
    x = torch.randn(2, 3, requires_grad=True)
    extent, middle = row_extent(x, QuantSpec(4, granularity=PerRow(-1)))
    assert not extent.requires_grad and not middle.requires_grad


@pytest.mark.parametrize('bits', range(2, 9))
@pytest.mark.parametrize('scheme', SCHEMES)
def test_the_share_counts_the_steps_of_a_range(bits, scheme):
    low, high = bounds(bits, scheme[0])
    share = full_range_share(QuantSpec(bits, *scheme, granularity=PerRow()))
    assert share == 1 / (high if scheme[1] else high - low)


@pytest.mark.parametrize(('codes', 'bits'), [('log2', 2), ('log2', 4), ('log_sqrt2', 4)])
def test_the_largest_value_of_a_vector_has_the_largest_level(codes, bits):
    spec = QuantSpec(bits, signed=False, granularity=PerRow(-1), codes=codes)
    levels = default_levels(codes, bits)
    x = (torch.rand(50, 31) + 0.1) * torch.logspace(-4, 3, 50)[:, None]
    scale, _ = grid_of(x, spec)
    top = quantize_to_levels(x / scale, levels).amax(-1)
    assert (top == float(levels[-1])).all()
    assert full_range_share(spec) == full_range_share(spec, levels) == 1 / int(levels[-1])
    assert full_range_share(spec, torch.tensor([0, 1, 2, 4])) == 0.25
