# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gplq_mm.quantizers import FakeQuantizer, PerChannel, PerRow, PerTensor, QuantSpec
from gplq_mm.quantizers.fake_quantizer import Grid
from gplq_mm.quantizers.row_range import ROW_SLACK
from tests.helpers.reference import SCHEMES, bounds, calibrated

GRANULARITIES = [PerTensor(), PerChannel(-1), PerChannel(1), PerRow(-1), PerRow(-2)]
SHAPE = (2, 3, 5, 7)


def quantizer(bits, scheme, granularity, x, codes='uniform'):
    size = x.shape[granularity.axis] if isinstance(granularity, PerChannel) else None
    spec = QuantSpec(bits, *scheme, granularity=granularity, learn_scale=True, codes=codes)
    return calibrated(FakeQuantizer(spec, size), x)


@given(
    bits=st.integers(2, 8),
    scheme=st.sampled_from(SCHEMES),
    granularity=st.sampled_from(GRANULARITIES),
    seed=st.integers(0, 10**6),
)
def test_a_form_has_the_scale_and_zero_point_of_the_reference(bits, scheme, granularity, seed):
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) + 0.3
    q = quantizer(bits, scheme, granularity, x)
    steps = q.packed_form(x.shape).steps(x, q.scale.detach())
    scale, zero_point = q.qparams(x)
    assert torch.equal(steps.scale, scale.detach())
    offset = torch.as_tensor(steps.grid.zero_point)
    assert torch.equal(offset.expand(zero_point.shape), zero_point)
    assert (steps.grid.qmin, steps.grid.qmax) == bounds(bits, scheme[0])
    assert steps.grid.slack == q.slack == (ROW_SLACK if isinstance(granularity, PerRow) else 0)


@pytest.mark.parametrize('granularity', GRANULARITIES)
@pytest.mark.parametrize('scheme', SCHEMES)
def test_what_is_kept_gives_the_steps_again(granularity, scheme):
    x = torch.randn(SHAPE)
    q = quantizer(4, scheme, granularity, x)
    form, parameter = q.packed_form(x.shape), q.scale.detach()
    steps = form.steps(x, parameter)
    kept = form.kept(steps)
    again = form.kept_steps(kept, parameter)
    assert torch.equal(again.scale, steps.scale)
    assert torch.equal(*(torch.as_tensor(s.grid.zero_point) for s in (again, steps)))
    follows = isinstance(granularity, PerRow)
    assert [k is not None for k in kept] == [follows, follows and not scheme[1]]


@pytest.mark.parametrize('granularity', GRANULARITIES)
def test_the_parameters_gradient_is_autograds(granularity):
    x = torch.randn(SHAPE)
    q = quantizer(4, (True, False), granularity, x)
    form = q.packed_form(x.shape)
    grad = torch.randn_like(form.steps(x, q.scale.detach()).scale)
    q.qparams(x)[0].backward(grad)
    steps = form.steps(x, q.scale.detach())
    found = form.gradient(grad, q.scale.detach(), steps.scale)
    assert found.shape == q.scale.shape
    torch.testing.assert_close(found, q.scale.grad, rtol=1e-5, atol=1e-6)
    assert form.gradient(None, q.scale, steps.scale) is None


@pytest.mark.parametrize('bits', range(2, 9))
@pytest.mark.parametrize('signed', [True, False])
def test_a_code_with_its_offset_fits_its_signed_bits(bits, signed):
    grid = Grid(*bounds(bits, signed), 0.0)
    half = 8 if grid.is_narrow else 128
    assert grid.is_narrow == (bits <= 4)
    assert -half <= grid.qmin + grid.offset and grid.qmax + grid.offset < half


def test_slack_widens_the_bounds_on_both_sides():
    grid = Grid(-8, 7, 2.0)
    assert grid.bounds == (-10.0, 5.0)
    assert grid._replace(slack=ROW_SLACK).bounds == (-10.5, 5.5)
    per_channel = grid._replace(zero_point=torch.tensor([2.0, 0.0]), slack=ROW_SLACK)
    assert [b.tolist() for b in per_channel.bounds] == [[-10.5, -8.5], [5.5, 7.5]]


def test_a_form_of_logarithmic_codes_has_their_table():
    x = torch.rand(SHAPE)
    q = quantizer(4, (False, True), PerRow(-1), x, 'log2')
    grid = q.packed_form(x.shape).grid
    assert grid.levels is q.levels
    assert quantizer(4, (False, True), PerRow(-1), x).packed_form(x.shape).grid.levels is None
