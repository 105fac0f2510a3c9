# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import dataclasses

import pytest
import torch

from gplq_mm.quantizers import FakeQuantizer, PerChannel, PerRow, PerTensor, QuantSpec
from gplq_mm.quantizers.stored_form import require_same_form, stored_spec

ROWS = QuantSpec(granularity=PerRow())
LOG = dataclasses.replace(ROWS, signed=False, symmetric=True, codes='auto')


def state(spec, size=None):
    return FakeQuantizer(spec, size).state_dict(prefix='q.')


@pytest.mark.parametrize(
    ('spec', 'stored', 'size', 'granularity'),
    [
        (QuantSpec(granularity=PerChannel(-1)), PerTensor(), None, PerTensor()),
        (QuantSpec(granularity=PerChannel(-1)), PerChannel(-1), 6, PerChannel(-1)),
        (ROWS, PerTensor(), None, PerTensor()),
        (ROWS, PerChannel(1), 2, PerChannel(1)),
        (ROWS, PerRow(), None, PerRow()),
        (LOG, PerTensor(), None, PerTensor()),
    ],
)
def test_a_static_state_says_its_granularity(spec, stored, size, granularity):
    found = stored_spec(spec, state(QuantSpec(granularity=stored), size), 'q.')
    codes = 'uniform' if spec is LOG else spec.codes
    assert found == dataclasses.replace(spec, granularity=granularity, codes=codes)


def test_channels_of_an_image_are_known_where_the_axis_is_given():
    stored = state(QuantSpec(granularity=PerChannel(-3)), 3)
    assert stored_spec(QuantSpec(), stored, 'q.', axis=-3).granularity == PerChannel(-3)
    assert stored_spec(QuantSpec(), stored, 'q.').granularity == PerTensor()


def test_rows_logarithmic_codes_and_no_state_leave_the_spec():
    assert stored_spec(LOG, state(LOG), 'q.') is LOG
    assert stored_spec(ROWS, {}, 'q.') is ROWS


@pytest.mark.parametrize(
    ('own', 'stored', 'sizes', 'message'),
    [
        (PerTensor(), PerRow(), (None, None), r'uniform codes with a scale per vector of ax'),
        (PerRow(-1), PerRow(-2), (None, None), r'vector of axis -2, .* has .* axis -1; use'),
        (PerTensor(), PerChannel(-1), (None, 6), r'shape \(6,\), .* has .* shape \(\); use'),
    ],
)
def test_another_form_is_named(own, stored, sizes, message):
    one = FakeQuantizer(QuantSpec(granularity=own), sizes[0]).state_dict()
    with pytest.raises(ValueError, match=f'q.scale: the checkpoint holds .*{message}'):
        require_same_form(one, state(QuantSpec(granularity=stored), sizes[1]), 'q.')


def test_other_codes_are_named_and_a_float_state_is_left_alone():
    uniform = FakeQuantizer(ROWS).state_dict()
    with pytest.raises(ValueError, match=r'holds logarithmic codes .* has uniform codes'):
        require_same_form(uniform, state(LOG), 'q.')
    require_same_form(uniform, {'weight': torch.ones(3)})


@pytest.mark.parametrize('learn', [True, False])
@pytest.mark.parametrize('spec', [QuantSpec(granularity=PerChannel(-1)), ROWS, LOG])
@pytest.mark.parametrize('stored', [PerTensor(), PerChannel(1)])
def test_a_quantizer_takes_the_form_of_a_former_state(learn, spec, stored):
    spec = dataclasses.replace(spec, learn_scale=learn)
    if stored == PerChannel(1) and spec.granularity == PerChannel(-1):
        return  # such a state is of another model
    size = None if stored == PerTensor() else 2
    former = FakeQuantizer(dataclasses.replace(spec, granularity=stored, codes='uniform'), size)
    former.set_qparams(torch.rand_like(former.scale) + 0.1, torch.zeros_like(former.scale))
    model = torch.nn.ModuleDict({'q': FakeQuantizer(spec, 6)})
    scale, zero_point = model['q'].scale, model['q'].zero_point
    model.load_state_dict(former.state_dict(prefix='q.'))
    assert model['q'].spec == former.spec and model['q'].is_active
    x = torch.randn(3, 2, 5, 6)
    assert torch.equal(model['q'](x), former(x))
    assert model['q'].scale is scale and model['q'].zero_point is zero_point
    assert isinstance(scale, torch.nn.Parameter) == learn == scale.requires_grad
    assert set(model['q'].state_dict()) == set(former.state_dict())


def test_an_optimizer_that_knows_the_scale_goes_on_with_it():
    model = torch.nn.ModuleDict({'q': FakeQuantizer(dataclasses.replace(ROWS, learn_scale=True))})
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    spec = QuantSpec(granularity=PerChannel(1), learn_scale=True)
    former = FakeQuantizer(spec, 2)
    former.set_qparams(torch.ones(2), torch.zeros(2))
    model.load_state_dict(former.state_dict(prefix='q.'))
    model['q'](torch.randn(3, 2, 5, 6)).square().sum().backward()
    optimizer.step()
    assert model['q'].scale.shape == (2,) and (model['q'].scale != 1).all()


def test_a_weight_keeps_its_form():
    spec = QuantSpec(granularity=PerChannel(0))
    weight = FakeQuantizer(spec, 6, 'weight')
    weight.take_form_of(FakeQuantizer(QuantSpec()).state_dict())
    assert weight.spec == spec


def test_a_present_state_does_not_enter_a_static_quantizer():
    model = torch.nn.ModuleDict({'q': FakeQuantizer(QuantSpec())})
    with pytest.raises(ValueError, match=r'q.scale: .* a scale per vector of axis -1, this'):
        model.load_state_dict(state(ROWS))
