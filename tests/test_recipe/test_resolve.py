# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gplq_mm.quantizers import OBSERVERS, PerChannel, PerTensor
from gplq_mm.recipe import (
    PRESETS,
    ROLES,
    Recipe,
    as_recipe,
    recipe_difference,
    resolve_recipe,
    scope_prefixes,
    spec_from_settings,
)

COMMON = {
    'num_bits': st.integers(2, 8),
    'signed': st.booleans(),
    'granularity': st.sampled_from(['per_tensor', 'per_channel']),
}
OBSERVER = {'observer': st.sampled_from(sorted(OBSERVERS))}
SETTINGS = st.fixed_dictionaries({}, optional={**COMMON, **OBSERVER})
WEIGHTS = st.fixed_dictionaries({}, optional=COMMON)
RULES = st.fixed_dictionaries(
    {'role': st.sampled_from(ROLES), 'enabled': st.booleans()},
    optional={'activation': SETTINGS, 'weight': WEIGHTS},
)
RECIPES = st.fixed_dictionaries(
    {},
    optional={
        'base': st.sampled_from(sorted(PRESETS)),
        'activation': SETTINGS,
        'weight': WEIGHTS,
        'rules': st.lists(RULES, max_size=3).map(tuple),
        'scope': st.sampled_from(['auto', 'backbone', 'all', ['backbone', 'rpn_head']]),
        'calibration': st.fixed_dictionaries({'num_images': st.integers(1, 9)}),
    },
)


@given(RECIPES)
def test_resolving_twice_changes_nothing(recipe):
    kept = copy.deepcopy(recipe)
    once = resolve_recipe(recipe)
    assert resolve_recipe(once) == once and recipe == kept
    assert as_recipe(as_recipe(recipe)).as_dict() == once
    assert recipe_difference(once, resolve_recipe(once)) == []
    for kind in ('activation', 'weight', 'calibration'):
        assert recipe.get(kind, {}).items() <= once[kind].items()


def test_dicts_merge_rules_append_and_the_rest_replaces():
    rule = {'name': '*.patch_embed', 'num_bits': 8}
    recipe = resolve_recipe(
        dict(base='w3a3', activation=dict(num_bits=5), rules=[rule], scope='all')
    )
    preset = PRESETS['w3a3']
    assert recipe['activation'] == {**preset['activation'], 'num_bits': 5}
    assert recipe['weight'] == preset['weight']
    assert recipe['rules'] == [*preset['rules'], rule]
    assert recipe['scope'] == 'all'


def test_without_a_base_it_is_w4a4():
    assert resolve_recipe({}) == resolve_recipe('w4a4')


BAD = [
    ('w4a5', r"'w4a5' is unknown; write one of .*'w4a4'.*did you mean 'w4a"),
    (dict(base='nonsense'), r"'nonsense' is unknown; write one of"),
    (dict(activations={}), r"recipe has no key 'activations'; did you mean 'activation'\?"),
    (dict(weight=dict(bits=4)), r"recipe.weight has no key 'bits'.*'num_bits'"),
    (dict(weight=dict(codes='log2')), r"recipe.weight has no key 'codes'"),
    (dict(activation=dict(num_bits=9)), r'activation.num_bits=9: write an integer from 2 to 8'),
    (dict(weight=dict(num_bits=1)), r'recipe.weight.num_bits=1: write an integer from 2 to 8'),
    (dict(weight=dict(num_bits='4')), r"num_bits='4': write an integer from 2 to 8"),
    (dict(activation=dict(num_bits=True)), r'num_bits=True: write an integer from 2 to 8'),
    (dict(activation=dict(enabled='flase')), r"enabled='flase': write True or False"),
    (dict(activation=dict(symmetric='flase')), r"symmetric='flase': write True or False"),
    (dict(activation=dict(signed=1)), r'activation.signed=1: write True or False'),
    (dict(activation=dict(observer_args=[1])), r'observer_args=\[1\]: write a dict'),
    (dict(scope='head'), r"scope='head': write one of .*'backbone'.* or a list"),
    (dict(scope='backbon'), r"scope='backbon'.*; did you mean 'backbone'\?"),
    (dict(scope=3), r"scope=3: write one of .*'backbone'"),
    (dict(scope=[1]), r'scope=\[1\]: write one of'),
    (dict(name=4), r'recipe.name=4: write a string'),
    (dict(activation=dict(observer='mean')), r"observer='mean': write one of .*'mse'"),
    (
        dict(activation=dict(granularity='row')),
        r"granularity='row': write one of \('per_tensor', 'per_channel', 'per_row'\)",
    ),
    (
        dict(weight=dict(granularity='per_row')),
        r"granularity='per_row': write one of \('per_tensor', 'per_channel'\)",
    ),
    (dict(activation=dict(codes='log')), r"codes='log': write one of .*'adalog'"),
    (dict(optim=dict(scale_step='log')), r"scale_step='log': write one of .*'relative'"),
    (dict(calibration=dict(migrate='yes')), r"migrate='yes': write True or False"),
    (dict(calibration=dict(compensate=1)), r'compensate=1: write True or False'),
    (dict(activation='int4'), r"recipe.activation='int4': write a dict of .*'num_bits'"),
    (dict(calibration=None), r'recipe.calibration=None: write a dict of'),
    (dict(rules=dict(name='*')), r'recipe.rules=.*: write a list of'),
    (dict(rules=['*.attn.*']), r"recipe.rules\[\d\]='\*.attn.\*': write a dict of"),
    (dict(rules=[dict(num_bits=8)]), r"names nothing; give name='\*.pattern.\*' or role='softmax'"),
    (dict(rules=[dict(name='*', bits=8)]), r"rules\[\d\] has no key 'bits'.*; the keys are"),
    (dict(rules=[dict(role='softmx')]), r"role='softmx'.*did you mean 'softmax'"),
    (dict(rules=[dict(name='*', num_bits=16)]), r'rules\[\d\].num_bits=16: .* from 2 to 8'),
    (dict(rules=[dict(name='*', weight=dict(num_bits=0))]), r'rules\[\d\].weight.num_bits=0'),
    (
        dict(rules=[dict(name='*', weight=dict(nbits=4))]),
        r"rules\[\d\].weight has no key 'nbits'; did you mean 'num_bits'",
    ),
    (
        dict(rules=[dict(name='*', weight=dict(ptq='mse'))]),
        r'rules\[\d\].weight.ptq: stage 2 quantizes all weights by one algorithm',
    ),
    (dict(weight=dict(ptq=3)), r"weight.ptq=3: write a name such as 'gptq'"),
    (
        dict(weight=dict(qat=True)),
        r'qat=True and learn_scale=False .* write weight=dict',
    ),
    (dict(weight=dict(learn_scale=True)), r'qat=False and learn_scale=True have no effect'),
    (dict(weight=dict(observer='mse')), r"observer='mse' .* write weight=dict\(ptq='mse'\)"),
    (dict(calibration=dict(num_images=0)), r"num_images=0: write a positive integer or 'auto'"),
    (dict(calibration=dict(batch_size=1.5)), r'batch_size=1.5: write a positive integer'),
    (dict(calibration=dict(num_images=True)), r'num_images=True: write a positive integer'),
    (dict(calibration=dict(seed='x')), r"seed='x': write an integer from 0"),
    (dict(calibration=dict(images=3)), r"recipe.calibration has no key 'images'"),
    (dict(gate=dict(action='halt')), r"gate.action='halt': write one of .*'stop'"),
    (dict(gate=dict(max_feature_error=float('nan'))), r'max_feature_error=nan: write a number fr'),
    (dict(optim=dict(lr='1e-4')), r"optim.lr='1e-4': write a number from 0 or 'auto'"),
    (dict(optim=dict(scale_lr=-1.0)), r'recipe.optim.scale_lr=-1.0: write a number from 0'),
    (
        dict(optim=dict(betas=0.9)),
        r'optim.betas=0.9: write two of a number from 0 below 1',
    ),
    (dict(optim=dict(betas=[0.9, 1])), r'optim.betas=\[0.9, 1\]: write two of'),
    (dict(optim=dict(betas=[0.9])), r'optim.betas=\[0.9\]: write two of'),
    (dict(optim=dict(train='atention')), r"train='atention': .*; did you mean 'attention'\?"),
    (dict(optim=dict(drop_rates=0.1)), r"drop_rates=0.1: write one of \('keep', 'off', 'auto'\)"),
    (dict(optim=dict(learning_rate=1)), r"recipe.optim has no key 'learning_rate'; .*'scale_lr'"),
    (dict(stage2=dict(compensate='qwt')), r"stage2 has no key 'compensate'.*'compensation'"),
    (dict(stage2=dict(num_images=0)), r'stage2.num_images=0: write a positive integer or None'),
    (dict(stage2=dict(compensation='qvt')), r"compensation='qvt': .*; did you mean 'qwt'\?"),
    (
        dict(stage2=dict(compensation=dict(ridge=-1))),
        r'compensation.ridge=-1: write a number',
    ),
    (dict(mimic=dict(typ='pca')), r"recipe.mimic has no key 'typ'; did you mean 'type'\?"),
    (dict(mimic=dict(layer=3)), r'recipe.mimic.layer=3: write a string or None'),
    (dict(mimic=[dict(layer='x')]), r"recipe.mimic\[0\] has no 'type'"),
    (dict(mimic=dict(type='logits', layer='x')), r"layer='x' has no effect with type='logits'"),
]


@pytest.mark.parametrize(('recipe', 'message'), BAD)
def test_wrong_input_names_what_came_what_may_and_what_to_write(recipe, message):
    with pytest.raises(ValueError, match=message) as found:
        resolve_recipe(recipe)
    assert '\n' not in str(found.value)


@pytest.mark.parametrize('recipe', [None, 4, ['w4a4'], dict(base=4)])
def test_other_types_are_refused(recipe):
    with pytest.raises(TypeError, match=r"write a preset's name such as 'w4a4'"):
        resolve_recipe(recipe)


def test_difference_names_dotted_keys_and_both_values():
    a = resolve_recipe('w4a4')
    b = resolve_recipe(dict(name='w4a4', activation=dict(num_bits=3)))
    assert recipe_difference(a, b) == ['activation.num_bits: 4 != 3']
    b['rules'].append({'name': 'x'})
    found = recipe_difference(a, b)
    assert len(found) == 2 and found[1].startswith('rules: ')
    assert recipe_difference({'betas': (1, 2)}, {'betas': [1, 2]}) == []
    assert recipe_difference({}, {'new': 1}) == ['new: None != 1']


def test_specs_follow_the_settings():
    settings = as_recipe(dict(activation=dict(granularity='per_channel'))).activation
    assert spec_from_settings(settings, -1).granularity == PerChannel(-1)
    assert spec_from_settings(settings, None).granularity == PerTensor()
    args = {'percentile': 0.9}
    changed = settings.change(observer='percentile', observer_args=args)
    spec = spec_from_settings(changed, 1)
    assert spec.observer_args == args and spec.observer_args is not args


def test_scopes():
    assert scope_prefixes('backbone+neck') == ('backbone', 'neck')
    assert scope_prefixes('all') == ('',)
    assert scope_prefixes(('a', 'b.c')) == ('a', 'b.c')


def test_a_decay_that_relative_steps_would_ignore_is_refused() -> None:
    with pytest.raises(ValueError, match='scale_weight_decay=0.1 has no effect'):
        resolve_recipe(dict(optim=dict(scale_weight_decay=0.1)))
    absolute = dict(scale_weight_decay=0.1, scale_step='absolute')
    assert resolve_recipe(dict(optim=absolute))['optim']['scale_weight_decay'] == 0.1


@pytest.mark.parametrize('missing', ['weight', 'weight.ptq', 'optim.lr', 'calibration.seed'])
def test_a_whole_recipe_gives_what_has_no_default(missing: str) -> None:
    recipe = resolve_recipe('w4a4')
    section, _, key = missing.partition('.')
    del (recipe[section] if key else recipe)[key or section]
    with pytest.raises(ValueError, match=f"has no '{key or section}'; a full recipe gives it"):
        Recipe.from_dict(recipe, 'recipe')


def test_a_type_of_mimicking_leaves_the_presets_other_keys_behind() -> None:
    recipe = as_recipe(dict(base='gplq_w4a4_paper', mimic=dict(type='feature')))
    assert recipe.mimic.as_dict() == dict(type='feature', loss_weight=1.0)
    kept = as_recipe(dict(base='gplq_w4a4_paper', mimic=dict(loss_weight=2.0)))
    assert kept.mimic.explained_variance == 0.6


def test_a_copy_with_other_values_is_checked() -> None:
    recipe = as_recipe('w4a4')
    assert recipe.change(scope=['a']).scope == ('a',)
    with pytest.raises(ValueError, match=r'num_bits=9: write an integer from 2 to 8'):
        recipe.weight.change(num_bits=9)
