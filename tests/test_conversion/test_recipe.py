# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gplq_mm.conversion import PRESETS, recipe_difference, resolve_recipe
from gplq_mm.conversion.match import ROLES
from gplq_mm.conversion.recipe import scope_prefixes, spec_from_settings
from gplq_mm.quantizers import OBSERVERS, PerChannel, PerTensor

SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        'num_bits': st.integers(2, 8),
        'signed': st.booleans(),
        'granularity': st.sampled_from(['per_tensor', 'per_channel']),
        'observer': st.sampled_from(sorted(OBSERVERS)),
    },
)
RULES = st.fixed_dictionaries(
    {'role': st.sampled_from(ROLES)},
    optional={'activation': SETTINGS, 'weight': SETTINGS, 'enabled': st.booleans()},
)
RECIPES = st.fixed_dictionaries(
    {},
    optional={
        'base': st.sampled_from(sorted(PRESETS)),
        'activation': SETTINGS,
        'weight': SETTINGS,
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
    (dict(activations={}), r"recipe has no key 'activations'; the keys are .*'activation'"),
    (dict(weight=dict(bits=4)), r"recipe.weight has no key 'bits'; the keys are .*'num_bits'"),
    (dict(activation=dict(num_bits=9)), r'recipe.activation: num_bits=9 .* from 2 to 8'),
    (dict(weight=dict(num_bits=1)), r'recipe.weight: num_bits=1 .* from 2 to 8'),
    (dict(weight=dict(num_bits='4')), r"num_bits='4' .* from 2 to 8"),
    (dict(scope='head'), r"scope='head' is unknown; write one of .*'backbone'.* or a list"),
    (dict(scope=3), r"scope=3: write one of .*'backbone'"),
    (dict(scope=[1]), r'scope=\[1\]: write one of'),
    (dict(activation=dict(observer='mean')), r"observer='mean' is unknown; write one of .*'mse'"),
    (
        dict(activation=dict(granularity='row')),
        r"granularity='row' is unknown; write one of \('per_tensor', 'per_channel', 'per_row'\)",
    ),
    (
        dict(weight=dict(granularity='per_row')),
        r"weight has no rows to follow; write 'per_channel'",
    ),
    (dict(activation=dict(codes='log')), r"codes='log' is unknown; write one of .*'adalog'"),
    (dict(optim=dict(scale_step='log')), r"scale_step='log': write one of .*'relative'"),
    (dict(calibration=dict(migrate='yes')), r"migrate='yes': write True or False"),
    (dict(activation='int4'), r"recipe.activation='int4': write a dict of .*'num_bits'"),
    (dict(rules=dict(name='*')), r'recipe.rules=.*: write a list'),
    (dict(rules=['*.attn.*']), r"recipe.rules\[\d\]='\*.attn.\*': write a dict of"),
    (dict(rules=[dict(num_bits=8)]), r"names nothing; give name='\*.pattern.\*' or role='softmax'"),
    (dict(rules=[dict(name='*', bits=8)]), r"rules\[\d\] has no key 'bits'; the keys are"),
    (dict(rules=[dict(role='softmx')]), r"role='softmx' is unknown; write one of .*'softmax'"),
    (dict(rules=[dict(name='*', num_bits=16)]), r'rules\[\d\]: num_bits=16 .* from 2 to 8'),
    (dict(rules=[dict(name='*', weight=dict(num_bits=0))]), r'rules\[\d\].weight: num_bits=0'),
    (
        dict(rules=[dict(name='*', weight=dict(nbits=4))]),
        r"rules\[\d\].weight has no key 'nbits'",
    ),
    (dict(calibration=dict(num_images=0)), r'num_images=0: write a positive integer'),
    (dict(calibration=dict(batch_size=1.5)), r'batch_size=1.5: write a positive integer'),
    (dict(calibration=dict(num_images=True)), r'num_images=True: write a positive integer'),
    (dict(calibration=dict(seed='x')), r"seed='x': write an integer from 0"),
    (dict(optim=dict(lr='1e-4')), r"recipe.optim.lr='1e-4': write a number from 0"),
    (dict(optim=dict(scale_lr=-1.0)), r'recipe.optim.scale_lr=-1.0: write a number from 0'),
    (dict(optim=dict(betas=0.9)), r'recipe.optim.betas=0.9: write two numbers'),
    (dict(calibration=dict(images=3)), r"recipe.calibration has no key 'images'"),
    (dict(optim=dict(learning_rate=1)), r"recipe.optim has no key 'learning_rate'; .*'scale_lr'"),
]


@pytest.mark.parametrize(('recipe', 'message'), BAD)
def test_wrong_input_names_what_came_what_may_and_what_to_write(recipe, message):
    with pytest.raises(ValueError, match=message):
        resolve_recipe(recipe)


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
    settings = resolve_recipe(dict(activation=dict(granularity='per_channel')))['activation']
    assert spec_from_settings(settings, -1).granularity == PerChannel(-1)
    assert spec_from_settings(settings, None).granularity == PerTensor()
    args = {'percentile': 0.9}
    spec = spec_from_settings({**settings, 'observer': 'percentile', 'observer_args': args}, 1)
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


@pytest.mark.parametrize(
    ('recipe', 'message'),
    [
        (dict(calibration=dict(migrate='yes')), r"calibration.migrate='yes': write True or False"),
        (dict(calibration=dict(compensate=1)), r'calibration.compensate=1: write True or False'),
        (dict(optim=dict(scale_step='log')), r"scale_step='log': write one of"),
        (dict(activation=dict(granularity='per_token')), r"granularity='per_token' is unknown"),
        (dict(weight=dict(granularity='per_row')), r'a weight has no rows to follow'),
        (dict(activation=dict(codes='log3')), r"codes='log3' is unknown"),
    ],
)
def test_new_keys_are_checked(recipe: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_recipe(recipe)
