# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import copy
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gplq_mm.quantizers import (
    FakeQuantizer,
    PerChannel,
    PerRow,
    PerTensor,
    QuantSpec,
    UncalibratedError,
    build_observer,
)
from gplq_mm.quantizers.fake_quantizer import lsq_grad_factor
from gplq_mm.quantizers.log_codes import candidate_bases, log_levels, quantize_to_levels
from tests.helpers.reference import SCHEMES, calibrated, centred, steps

WHOLE = PerTensor()
SHAPES = [(1, 1, 6), (2, 7, 6), (0, 3, 6), (1, 5, 13, 6)]
CASES = {
    'bits': st.integers(2, 8),
    'scheme': st.sampled_from(SCHEMES),
    'granularity': st.sampled_from([PerTensor(), PerChannel(-1), PerChannel(1)]),
    'learn': st.booleans(),
    'shape': st.sampled_from(SHAPES),
    'seed': st.integers(0, 10**6),
}


def make(bits=4, scheme=(True, True), granularity=WHOLE, learn=False, x=None, **kwargs):
    """A quantizer, calibrated on `x` where that is given."""
    size = None if granularity == PerTensor() or x is None else x.shape[granularity.axis]
    quantizer = FakeQuantizer(
        QuantSpec(bits, *scheme, granularity=granularity, learn_scale=learn), size, **kwargs
    )
    return quantizer if x is None or x.numel() == 0 else calibrated(quantizer, x)


def sample(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3


@given(**CASES)
def test_values_and_codes_equal_the_integer_reference(
    bits, scheme, granularity, learn, shape, seed
):
    x = sample(shape, seed)
    axis_fits = granularity == PerTensor() or x.shape[granularity.axis] == 6
    quantizer = make(
        bits, scheme, granularity if axis_fits else PerTensor(), learn, sample((2, 6, 6), seed)
    )
    integers = centred(quantizer, x)
    codes, scale = quantizer.codes(x)
    assert np.array_equal(codes.detach().numpy(), integers.astype(np.float32))
    expected = integers.astype(np.float32) * scale.detach().numpy()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert np.array_equal(quantizer(x).detach().numpy(), expected)
    once = quantizer(x).detach()
    assert torch.equal(quantizer(once), once)
    assert (quantizer(torch.zeros(1, 6, 6)) == 0).all()


@pytest.mark.parametrize('bits', [2, 4, 8])
def test_each_scale_has_its_own_grid_of_at_most_two_to_the_bits(bits):
    x = torch.randn(2000, 3) * torch.tensor([0.1, 1.0, 30.0])
    y = make(bits, (True, False), PerChannel(-1), x=x)(x)
    assert all(len(y[:, c].unique()) <= 2**bits for c in range(3))


@pytest.mark.parametrize('granularity', [PerTensor(), PerChannel(-1), PerChannel(1)])
def test_the_scales_gradient_is_lsqs_times_its_factor(granularity):
    x = torch.randn(2, 4, 6)
    quantizer = make(3, (True, False), granularity, True, x * 0.5)
    count = quantizer.scale.numel()
    quantizer(x).sum().backward()
    codes, scale = centred(quantizer, x), quantizer.qparams(x)[0].detach()
    ratio, zero_point = (x / scale).numpy(), quantizer.qparams(x)[1].numpy()
    inside = (ratio > -4 - zero_point) & (ratio < 3 - zero_point)
    slope = torch.from_numpy(codes - np.where(inside, ratio, 0))
    expected = slope.sum_to_size(scale.shape).flatten() * lsq_grad_factor(48, count, 3)
    assert torch.allclose(quantizer.scale.grad.flatten(), expected.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('start', [-1.0, 0.0, 1e-12])
def test_a_scale_below_the_bound_acts_alike_with_and_without_gradients(start):
    quantizer = make(learn=True, x=torch.randn(9))
    with torch.no_grad():
        quantizer.scale.fill_(start)
    x = torch.tensor([1.0, -1.0, 0.0])
    trained, (codes, scale) = quantizer(x), quantizer.codes(x)
    with torch.no_grad():
        assert torch.equal(quantizer(x), trained)
        assert torch.equal(quantizer.codes(x)[0], codes) and quantizer.codes(x)[1] == scale > 0
    trained.square().sum().backward()
    assert quantizer.scale.grad is not None and quantizer.scale.grad != 0


def test_scale_is_a_parameter_only_if_learned():
    assert isinstance(make(learn=True).scale, torch.nn.Parameter)
    assert not list(make(learn=False).parameters())
    assert set(make(learn=True).state_dict()) == set(make(learn=False).state_dict())


@pytest.mark.parametrize('learn', [True, False])
def test_state_dict_round_trip_restores_values_and_the_flag(learn):
    x = torch.randn(4, 6)
    source = make(4, (True, False), PerChannel(-1), learn, x)
    target = FakeQuantizer(source.spec, 6)
    assert not target.is_calibrated and not target.is_active
    target.load_state_dict(source.state_dict())
    assert target.is_calibrated and target.is_active
    assert torch.equal(target(x), source(x))
    source.reset()
    target.load_state_dict(source.state_dict())
    assert not target.is_calibrated


def test_a_float_checkpoint_leaves_the_flag_alone():
    quantizer = make(x=torch.randn(5))
    quantizer.load_state_dict({}, strict=False)
    assert quantizer.is_calibrated


def test_deepcopy_is_independent():
    x = torch.randn(5)
    quantizer = make(learn=True, x=x)
    twin = copy.deepcopy(quantizer)
    assert twin.is_calibrated and torch.equal(twin(x), quantizer(x))
    twin.reset()
    assert quantizer.is_calibrated and bool(quantizer.calibrated)


@pytest.mark.parametrize('other', [dict(bits=3), dict(scheme=(False, True))])
def test_a_checkpoint_of_other_codes_is_refused_by_name(other):
    model = torch.nn.ModuleDict({'input_quantizer': make(bits=4)})
    wrong = torch.nn.ModuleDict({'input_quantizer': make(**other)})
    with pytest.raises(ValueError, match=r'input_quantizer.quant_range: .*\[-8, 7\].*recipe'):
        model.load_state_dict(wrong.state_dict())


def test_an_uncalibrated_activation_is_refused_by_name():
    quantizer = make()
    quantizer.name = 'backbone.fc.input_quantizer'
    for call in (quantizer, quantizer.codes):
        with pytest.raises(UncalibratedError, match=r'backbone.fc.input_quantizer .*GPLQHook'):
            call(torch.ones(2))


def test_an_uncalibrated_weight_passes_through():
    quantizer, x = make(kind='weight'), torch.randn(3)
    assert quantizer(x) is x and not quantizer.is_active
    with pytest.raises(UncalibratedError):
        quantizer.codes(x)


def test_switched_off_it_returns_its_input():
    x = torch.randn(3)
    for quantizer in (make(), make(x=x)):
        quantizer.enabled = False
        assert quantizer(x) is x and not quantizer.is_active


def test_observing_passes_the_input_through_and_collects():
    x = torch.randn(6)
    quantizer = make(x=x)
    quantizer.observer = build_observer(quantizer.spec)
    assert quantizer(x * 2) is not None and not quantizer.is_active
    assert torch.equal(quantizer(x), x)
    assert quantizer.observer.num_updates == 2


def test_nan_while_observing_names_the_quantizer():
    quantizer = make()
    quantizer.name, quantizer.observer = 'neck.conv.input_quantizer', build_observer(quantizer.spec)
    with pytest.raises(ValueError, match=r'neck.conv.input_quantizer: NaN or infinity.*checkpoint'):
        quantizer(torch.tensor([1.0, float('nan')]))


@pytest.mark.parametrize(
    ('scale', 'zero_point', 'message'),
    [
        (float('nan'), 0.0, 'NaN or infinite'),
        (1.0, float('inf'), 'NaN or infinite'),
        (0.0, 0.0, 'must be positive'),
        (-1.0, 0.0, 'must be positive'),
    ],
)
def test_bad_qparams_are_refused(scale, zero_point, message):
    with pytest.raises(ValueError, match=f'quantizer: .*{message}'):
        make().set_qparams(torch.tensor(scale), torch.tensor(zero_point))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_arithmetic_is_float32_and_the_dtype_stays(dtype):
    x = torch.randn(200).to(dtype)
    quantizer = make(8, (True, False), x=x.float())
    y = quantizer(x)
    assert y.dtype == dtype
    assert torch.equal(y, quantizer(x.float()).to(dtype))
    assert quantizer.codes(x)[0].dtype == torch.float32


def test_autocast_does_not_change_the_result():
    x = torch.randn(4, 6, requires_grad=True)
    quantizer = make(learn=True, x=x)
    plain = quantizer(x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        mixed = quantizer(x)
    assert mixed.dtype == torch.float32 and torch.equal(plain, mixed)
    mixed.sum().backward()
    assert x.grad.dtype == torch.float32 and quantizer.scale.grad is not None


def test_gradients_reach_a_bfloat16_input():
    x = torch.randn(5, dtype=torch.bfloat16, requires_grad=True)
    make(x=x.detach().float() * 2)(x).sum().backward()
    assert x.grad.dtype == torch.bfloat16 and (x.grad == 1).all()


def test_non_contiguous_input():
    x = torch.randn(4, 6, 3)
    quantizer = make(granularity=PerChannel(1), x=x)
    assert torch.equal(quantizer(x.transpose(0, 2).contiguous().transpose(0, 2)), quantizer(x))


def test_print_shows_the_bits():
    assert 'activation, bits=4, unsigned, asymmetric, PerTensor()' in repr(
        make(scheme=(False, False))
    )


ROW_SHAPES = [(1, 1, 1), (2, 7, 6), (1, 1, 13), (3, 11, 1), (2, 3, 5, 7)]
LOG_CODES = [('log2', 2), ('log2', 4), ('log_sqrt2', 3), ('log_sqrt2', 4), ('adalog', 4)]


def row_quantizer(bits, scheme, axis, learn=False, codes='uniform'):
    spec = QuantSpec(bits, *scheme, granularity=PerRow(axis), learn_scale=learn, codes=codes)
    return calibrated(FakeQuantizer(spec), torch.zeros(1))


@given(
    bits=st.integers(2, 8),
    scheme=st.sampled_from(SCHEMES),
    axis=st.sampled_from([-1, -2]),
    shape=st.sampled_from(ROW_SHAPES),
    share=st.floats(0.25, 2.0, width=32),
    seed=st.integers(0, 10**6),
)
def test_row_scales_equal_the_integer_reference(bits, scheme, axis, shape, share, seed):
    x = sample(shape, seed)
    quantizer = row_quantizer(bits, scheme, axis, True)
    quantizer.set_qparams(quantizer.scale * share, quantizer.zero_point)
    integers = centred(quantizer, x)
    codes, scale = quantizer.codes(x)
    assert np.array_equal(codes.detach().numpy(), integers.astype(np.float32))
    assert np.array_equal(scale.detach().numpy(), steps(quantizer, x)[0])
    expected = integers.astype(np.float32) * scale.detach().numpy()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert np.array_equal(quantizer(x).detach().numpy(), expected)
    values = quantizer(x).detach().movedim(axis, -1).flatten(0, -2)
    assert all(len(row.unique()) <= 2**bits for row in values)
    assert (quantizer(torch.zeros(shape)) == 0).all()


@given(
    codes=st.sampled_from(LOG_CODES),
    granularity=st.sampled_from([PerTensor(), PerRow(-1), PerRow(-2)]),
    base=st.integers(0, 6),
    shape=st.sampled_from(ROW_SHAPES),
    seed=st.integers(0, 10**6),
)
def test_logarithmic_codes_equal_the_integer_reference(codes, granularity, base, shape, seed):
    x = sample(shape, seed).square()
    spec = QuantSpec(codes[1], signed=False, granularity=granularity, codes=codes[0])
    quantizer = FakeQuantizer(spec)
    bases = candidate_bases(*codes)
    quantizer.set_levels(log_levels(codes[1], bases[base % len(bases)]))
    calibrated(quantizer, x)
    integers = centred(quantizer, x)
    found, scale = quantizer.codes(x)
    assert np.array_equal(found.numpy(), integers.astype(np.float32))
    assert torch.isin(found, quantizer.levels.float()).all()
    expected = integers.astype(np.float32) * scale.numpy()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert np.array_equal(quantizer(x).detach().numpy(), expected)
    assert (quantizer(torch.zeros(shape)) == 0).all()


@pytest.mark.parametrize('axis', [-1, -2])
@pytest.mark.parametrize('scheme', SCHEMES)
def test_the_shares_gradient_is_that_of_every_vectors_scale(scheme, axis):
    x = torch.randn(2, 4, 6)
    quantizer = row_quantizer(3, scheme, axis, True)
    quantizer.set_qparams(quantizer.scale * 0.7, quantizer.zero_point)
    x.requires_grad_()
    grad = torch.randn(2, 4, 6)
    quantizer(x).backward(grad)
    scale, zero_point = (torch.from_numpy(s) for s in steps(quantizer, x))
    codes, ratio = torch.from_numpy(centred(quantizer, x)), x.detach() / scale
    low, high = quantizer.spec.quant_range
    inside = (ratio > low - zero_point - 0.5) & (ratio < high - zero_point + 0.5)
    assert torch.equal(x.grad, grad * inside)
    slope = codes - torch.where(inside, ratio, 0.0)
    share = quantizer.scale.detach()
    expected = (grad * slope * scale).sum() / share * lsq_grad_factor(48, 1, high)
    torch.testing.assert_close(quantizer.scale.grad, expected, rtol=1e-4, atol=1e-5)


def test_with_the_whole_range_every_element_of_a_vector_gets_its_gradient():
    x = torch.randn(5, 7, requires_grad=True)
    for scheme in SCHEMES[:2]:
        x.grad = None
        row_quantizer(4, scheme, -1)(x).sum().backward()
        assert (x.grad == 1).all()
    x.grad = None
    p = x.softmax(-1).detach().requires_grad_()
    row_quantizer(4, (False, True), -1, codes='log2')(p).sum().backward()
    torch.testing.assert_close(p.grad, torch.ones_like(p))


def test_the_gradient_of_a_logarithmic_codes_scale_is_lsqs():
    x = torch.rand(3, 40)
    quantizer = row_quantizer(4, (False, True), -1, True, 'log2')
    quantizer(x).sum().backward()
    scale = x.amax(-1, keepdim=True) * quantizer.scale.detach()
    level = quantize_to_levels(x / scale, quantizer.levels)
    expected = ((level - x / scale) * scale).sum() / quantizer.scale.detach()
    expected = expected * lsq_grad_factor(120, 1, 15)
    torch.testing.assert_close(quantizer.scale.grad, expected, rtol=1e-3, atol=1e-5)


def test_buffers_state_the_axis_of_rows_and_the_table_of_codes():
    usual = {'scale', 'zero_point', 'quant_range', 'calibrated'}
    assert set(make().state_dict()) == usual
    assert set(row_quantizer(4, (True, False), -2).state_dict()) == {*usual, 'row_axis'}
    assert row_quantizer(4, (True, False), -2).row_axis == -2
    both = row_quantizer(4, (False, True), -1, codes='adalog')
    assert set(both.state_dict()) == {*usual, 'row_axis', 'levels'}
    assert both.levels.dtype == torch.int32 and both.levels.shape == (16,)


def test_a_searched_table_is_restored_from_the_state_dict():
    source, target = (row_quantizer(4, (False, True), -1, codes='adalog') for _ in range(2))
    source.set_levels(log_levels(4, 2**0.25))
    x = torch.rand(3, 50)
    assert not torch.equal(source(x), target(x))
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(x), target(x))


def test_set_spec_adds_changes_and_removes_the_table():
    quantizer = row_quantizer(8, (False, True), -1, codes='auto')
    scale = quantizer.scale.clone()
    assert 'levels' not in quantizer.state_dict()
    for bits, size in ((4, 16), (3, 8), (8, None)):
        quantizer.set_spec(dataclasses.replace(quantizer.spec, num_bits=bits))
        assert quantizer.quant_range.tolist() == [0, 2**bits - 1]
        assert quantizer.state_dict().get('levels', torch.zeros(0)).numel() == (size or 0)
        assert torch.equal(quantizer.scale, scale)
    quantizer.set_spec(dataclasses.replace(quantizer.spec, num_bits=4, codes='adalog'))
    searched = log_levels(4, 2**0.25)
    quantizer.set_levels(searched)
    quantizer.set_spec(dataclasses.replace(quantizer.spec, observer='mse'))
    assert torch.equal(quantizer.levels, searched)  # same codes: the search is kept


@pytest.mark.parametrize('codes', ['uniform', 'log2'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_row_scales_are_found_in_float32(dtype, codes):
    x = torch.rand(5, 40).to(dtype)
    quantizer = row_quantizer(4, (False, True), -1, codes=codes)
    assert torch.equal(quantizer(x), quantizer(x.float()).to(dtype))


def test_print_shows_rows_and_codes():
    assert 'PerRow(axis=-1), log2' in repr(row_quantizer(4, (False, True), -1, codes='log2'))
