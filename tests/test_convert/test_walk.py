# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import copy

import pytest
import torch
from torch import nn

from gplq_mm.convert import convert_, quantized_layers, quantizers, set_quantization
from gplq_mm.quantizers import UncalibratedError
from tests.helpers.models import Attention, Detector, image
from tests.helpers.reference import calibrated


class SelfAttention(nn.Module):
    """No handler knows it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return self.fc(x)


def calibrate(model, x):
    """Observe every quantizer's input by a hook and set its range by hand."""
    set_quantization(model, False)
    hooks = [
        q.register_forward_pre_hook(lambda q, args: calibrated(q, args[0].detach()) and None)
        for q in quantizers(model, 'activation').values()
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    for layer in quantized_layers(model).values():
        calibrated(layer.weight_quantizer, layer.folded_weight())
    set_quantization(model, True)


@pytest.mark.parametrize('scope', ['auto', 'backbone', 'backbone+neck', 'all', ['neck']])
def test_keys_values_and_classes_stay(scope):
    model = Detector()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    classes = {name: type(module) for name, module in model.named_modules()}
    parameters = {name: id(p) for name, p in model.named_parameters()}
    convert_(model, dict(scope=scope))
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all('_quantizer.' in name for name in set(after) - set(before))
    modules = dict(model.named_modules())
    assert all(isinstance(modules[name], cls) for name, cls in classes.items())
    found = {n: id(p) for n, p in model.named_parameters() if '_quantizer' not in n}
    assert found == parameters
    assert model.load_state_dict(before, strict=False).unexpected_keys == []


@pytest.mark.parametrize(
    ('scope', 'linear', 'conv'),
    [('auto', 4, 1), ('backbone', 4, 1), ('backbone+neck', 4, 2), ('all', 4, 3), (['neck'], 0, 1)],
)
def test_the_scope_decides_what_is_quantized(scope, linear, conv):
    report = convert_(Detector(), dict(scope=scope))
    assert report.counts == {'linear': linear, 'conv': conv, 'matmul': 0}
    assert report.as_dict()['counts'] == report.counts


@pytest.mark.parametrize('granularity', ['per_tensor', 'per_channel'])
def test_switched_off_it_is_the_float_model_bit_for_bit(granularity):
    model, x = Detector(), image()
    twin = copy.deepcopy(model)
    convert_(model, dict(scope='all', activation=dict(granularity=granularity)))
    calibrate(model, x)
    assert not torch.equal(model(x), twin(x))
    set_quantization(model, False)
    outputs = [m(x) for m in (model, twin)]
    assert torch.equal(*outputs)
    for out in outputs:
        out.square().sum().backward()
    floats = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        if '_quantizer' in name:
            assert parameter.grad is None
        else:
            assert torch.equal(parameter.grad, floats[name].grad)


@pytest.mark.parametrize('granularity', ['per_tensor', 'per_channel'])
def test_eight_bits_are_close_and_both_paths_agree(granularity):
    model, x = Detector(), image()
    expected = model(x).detach()
    convert_(model, dict(base='w8a8', scope='all', activation=dict(granularity=granularity)))
    calibrate(model, x)
    values = model(x).detach()
    with torch.no_grad():
        integer = model(x)
    spread = expected.std()
    assert (values - expected).abs().max() < 0.1 * spread
    assert (values - integer).abs().max() < 0.05 * spread  # a code may flip by rounding


def test_save_and_load_give_the_same_output():
    model, x = Detector(), image()
    convert_(model, 'w4a4')
    calibrate(model, x)
    other = Detector()
    convert_(other, 'w4a4')
    with torch.no_grad():
        with pytest.raises(UncalibratedError, match=r'backbone.patch_embed.input_quantizer'):
            other(x)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), model(x))


def test_a_recipe_of_other_bits_refuses_the_checkpoint_by_name():
    model, other = Detector(), Detector()
    convert_(model, 'w4a4')
    convert_(other, 'w3a3')
    with pytest.raises(ValueError, match=r'backbone.attn.qkv.input_quantizer.quant_range.*-8, 7'):
        other.load_state_dict(model.state_dict())


def test_quantizers_know_their_names_and_kinds():
    model = Detector()
    convert_(model, 'w4a4')
    assert all(name == q.name for name, q in quantizers(model).items())
    kinds = {kind: set(quantizers(model, kind)) for kind in ('activation', 'weight')}
    assert kinds['weight'] == {f'{name}.weight_quantizer' for name in quantized_layers(model)}
    assert kinds['activation'] | kinds['weight'] == set(quantizers(model))
    set_quantization(model, False, 'weight')
    assert {q.enabled for q in quantizers(model, 'activation').values()} == {True}
    assert {q.enabled for q in quantizers(model, 'weight').values()} == {False}


def test_the_last_rule_wins_over_the_presets_own():
    model = Detector()
    rules = [dict(name='backbone.*', num_bits=3), dict(name='*.patch_embed', num_bits=6)]
    convert_(model, dict(rules=rules))
    assert model.backbone.patch_embed.input_quantizer.spec.num_bits == 6
    assert model.backbone.ffn[0].weight_quantizer.spec.num_bits == 3


@pytest.mark.parametrize(
    'rule',
    [
        dict(name='*.ffn.*', enabled=False),
        dict(name='*.ffn.*', activation=dict(enabled=False)),
        dict(name='*.ffn.*', weight=dict(enabled=False)),
    ],
)
def test_rules_turn_layers_off(rule):
    model = Detector()
    report = convert_(model, dict(rules=[rule]), strict=False)
    assert type(model.backbone.ffn[0]) is nn.Linear and not hasattr(model.neck, 'input_quantizer')
    off = [name for name, reason in report.kept_float if reason == 'turned off by a rule']
    assert off == ['backbone.ffn.0', 'backbone.ffn.2']


@pytest.mark.parametrize(
    'rule',
    [
        dict(name='*.typo', num_bits=8),
        dict(name='neck', num_bits=8),
        dict(role='rel_pos', num_bits=8),
    ],
)
def test_a_rule_that_matches_nothing_is_an_error(rule):
    with pytest.raises(
        ValueError, match=r'matches no layer in the scope \[.backbone.\]; correct'
    ) as e:
        convert_(Detector(), dict(rules=[rule]))
    assert str(rule) in str(e.value)


def test_an_optional_rule_may_match_nothing():
    rule = dict(name='*.typo', num_bits=8, optional=True)
    assert convert_(Detector(), dict(rules=[rule])).counts == convert_(Detector(), 'w4a4').counts


def test_what_stays_float_is_reported_and_strict_refuses_it():
    class RuleLinear(nn.Linear):
        """Its name must not pass for a rule's doing."""

    def build():
        model = Detector(attention=SelfAttention)
        model.backbone.conv = nn.Conv1d(2, 2, 1)
        model.backbone.odd = RuleLinear(2, 2)
        return model

    kept = dict(convert_(build(), 'w4a4').kept_float)
    assert 'unknown attention class SelfAttention' in kept['backbone.attn']
    assert 'no handler for torch.nn.modules.conv.Conv1d' in kept['backbone.conv']
    assert 'RuleLinear' in kept['backbone.odd']
    with pytest.raises(ValueError, match='strict=True, but these stay float') as error:
        convert_(build(), 'w4a4', strict=True)
    assert all(name in str(error.value) for name in kept)


def test_strict_accepts_what_rules_turn_off():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    report = convert_(model, dict(rules=[dict(name='1', enabled=False)]), strict=True)
    assert report.as_dict()['kept_float'] == [{'name': '1', 'reason': 'turned off by a rule'}]


def test_converting_twice_is_an_error():
    model = Detector()
    convert_(model, 'w4a4')
    with pytest.raises(ValueError, match='already converted; build a new float model'):
        convert_(model, 'w4a4')


@pytest.mark.parametrize('recipe', ['w4a4', dict(rules=[dict(name='*', enabled=False)])])
def test_nothing_quantized_is_an_error(recipe):
    model = nn.Sequential(nn.GELU()) if recipe == 'w4a4' else Detector()
    with pytest.raises(ValueError, match='nothing was quantized: .*widen the scope or the rules'):
        convert_(model, recipe)


def test_a_scope_that_matches_nothing_names_the_models_children():
    with pytest.raises(ValueError, match=r"'encoder' matches no module of Detector.*'bbox_head'"):
        convert_(Detector(), dict(scope=['encoder']))
    with pytest.raises(ValueError, match=r"'neck' matches no module of Attention"):
        convert_(Attention(), dict(scope=['neck']))


def test_a_shared_module_is_quantized_once():
    shared = nn.Linear(3, 3)
    model = nn.ModuleList([shared, nn.Sequential(shared)])
    assert convert_(model, 'w4a4').quantized['linear'] == ['0']
    assert model[1][0].input_quantizer is shared.input_quantizer


def test_a_converted_model_can_be_copied():
    model, x = Detector(), image()
    convert_(model, 'w4a4')
    calibrate(model, x)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(x), model(x))
