# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import re

import pytest

from gplq_mm.convert import PRESETS, resolve_recipe
from gplq_mm.quantizers import PerChannel, PerTensor, build_observer
from gplq_mm.recipe import as_recipe, ptq_of, settle_auto, spec_from_settings
from gplq_mm.recipe.presets import FORMER_PRESETS


@pytest.mark.parametrize('name', PRESETS)
def test_a_preset_is_a_complete_and_valid_recipe(name):
    recipe = resolve_recipe(name)
    assert recipe == resolve_recipe({'base': name}) == PRESETS[name]
    assert recipe['name'] == name
    for kind in ('activation', 'weight'):
        build_observer(spec_from_settings(getattr(as_recipe(name), kind), -1))
    assert all(rule['optional'] for rule in recipe['rules'])


@pytest.mark.parametrize('name', [n for n in PRESETS if n.startswith('w')])
def test_the_name_says_the_bits(name):
    weight, activation = re.match(r'w(\d)a(\d)', name).groups()
    assert PRESETS[name]['weight']['num_bits'] == int(weight)
    assert PRESETS[name]['activation']['num_bits'] == int(activation)


def test_the_promised_presets_exist():
    assert {'w4a4', 'w3a3', 'w8a8', 'w4a8', 'w2a4', 'gplq_w4a4_paper'} <= set(PRESETS)


def test_the_default_has_input_scales_a_channel_and_attention_scales_a_row():
    recipe = PRESETS['w4a4']
    spec = spec_from_settings(as_recipe(recipe).activation, -1)
    assert (spec.granularity, spec.symmetric, spec.observer) == (PerChannel(-1), False, 'mse')
    assert spec.learn_scale and spec.codes == 'uniform'
    rules = {rule['role']: rule for rule in recipe['rules']}
    for role in ('query', 'key', 'value'):
        assert rules[role]['activation'] == {'granularity': 'per_row'}
    softmax = {'granularity': 'per_row', 'signed': False, 'symmetric': True, 'codes': 'auto'}
    assert rules['softmax']['activation'] == softmax
    assert rules['image']['num_bits'] == 8
    assert rules['image']['activation'] == {'granularity': 'per_tensor'}
    assert recipe['optim']['scale_step'] == 'relative'


def test_the_former_default_is_per_tensor_asymmetric_mse_and_unsigned_after_softmax():
    recipe = resolve_recipe(FORMER_PRESETS['w4a4'])
    spec = spec_from_settings(as_recipe(recipe).activation, -1)
    assert (spec.granularity, spec.symmetric, spec.observer) == (PerTensor(), False, 'mse')
    assert spec.learn_scale
    rules = {rule['role']: rule for rule in recipe['rules']}
    assert rules['softmax']['activation'] == {'signed': False, 'symmetric': True}
    assert rules['image']['num_bits'] == 8
    assert not {'scale_step'} & set(recipe['optim']) and 'gate' not in recipe


def test_the_papers_is_signed_symmetric_per_channel_minmax_everywhere():
    recipe = PRESETS['gplq_w4a4_paper']
    spec = spec_from_settings(as_recipe(recipe).activation, -1)
    assert (spec.granularity, spec.symmetric, spec.signed) == (PerChannel(-1), True, True)
    assert spec.observer == 'minmax' and recipe['weight']['ptq'] == 'percentile'
    assert recipe['optim']['lr'] == recipe['optim']['scale_lr'] == 5e-6
    assert 'softmax' not in {rule['role'] for rule in recipe['rules']}


def test_resolving_hands_out_copies():
    resolve_recipe('w4a4')['activation']['num_bits'] = 2
    resolve_recipe({'base': 'w4a4', 'rules': []})['rules'].clear()
    assert PRESETS['w4a4']['activation']['num_bits'] == 4 and PRESETS['w4a4']['rules']


def test_weights_of_two_bits_aim_at_the_stage_1_output_where_activations_have_more():
    ptq = {name: ptq_of(name) for name in ('w2a4', 'w2a2', 'w3a3', 'w4a4')}
    assert ptq.pop('w2a4') == [{'type': 'gptq', 'asymmetric': True}]
    assert set(ptq.values()) == {'gptq'}
    own = resolve_recipe(dict(base='w2a4', weight=dict(ptq=dict(type='mse'))))
    assert own['weight']['ptq'] == {'type': 'mse'}


@pytest.mark.parametrize('name', ['w4a4', 'w3a3', 'w2a4'])
def test_a_pretrained_classifier_is_fine_tuned_after_guided_rounding(name: str) -> None:
    gptq, last = settle_auto(name, is_detector=False, width=384).weight.ptq
    asymmetric = {'asymmetric': True} if name == 'w2a4' else {}
    assert gptq == {'type': 'gptq', 'guided': 0.5, **asymmetric} and last == 'finetune'
    for small in (dict(is_detector=False, width=128), dict(is_detector=True, width=384)):
        assert settle_auto(name, **small).as_dict()['weight']['ptq'] == ptq_of(name)
    own = settle_auto(dict(base=name, weight=dict(ptq='mse')), is_detector=False, width=384)
    assert own.weight.ptq == 'mse'
