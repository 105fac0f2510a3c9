# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gplq_mm.quantizers import (
    FakeQuantizer,
    PerChannel,
    PerTensor,
    QuantSpec,
    UncalibratedError,
    build_observer,
)
from gplq_mm.quantizers.learned_scale import lsq_grad_factor
from tests.helpers.reference import SCHEMES, calibrated, centred

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
