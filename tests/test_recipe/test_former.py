# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import pytest

from gplq_mm.convert import PRESETS, recipe_difference, resolve_recipe
from gplq_mm.recipe.former import former_base, former_counterpart, is_former
from gplq_mm.recipe.presets import FORMER_PRESETS

MORE = [dict(name='*.stem', num_bits=8), dict(role='softmax', enabled=False)]


@pytest.mark.parametrize('name', FORMER_PRESETS)
def test_a_former_preset_has_a_name_of_its_own(name):
    assert resolve_recipe(f'{name}_v1') == {**FORMER_PRESETS[name], 'name': f'{name}_v1'}
    assert is_former(FORMER_PRESETS[name]) and not is_former(PRESETS[name])
    assert former_base(PRESETS[name]) == f'{name}_v1'


@pytest.mark.parametrize('name', FORMER_PRESETS)
def test_a_recorded_former_recipe_resolves_to_itself(name):
    assert resolve_recipe(FORMER_PRESETS[name]) == FORMER_PRESETS[name]


@pytest.mark.parametrize('name', FORMER_PRESETS)
@pytest.mark.parametrize(
    'changes',
    [
        {},
        dict(rules=MORE, scope='all'),
        dict(activation=dict(num_bits=5, granularity='per_tensor'), weight=dict(ptq='mse')),
        dict(optim=dict(lr=1e-4), calibration=dict(num_images=7), mimic=None),
    ],
)
def test_the_counterpart_is_what_the_same_words_meant_before(name, changes):
    words = {'base': name, **changes} if changes else name
    before = {'base': f'{name}_v1', **changes} if changes else f'{name}_v1'
    made_with = resolve_recipe(before)
    assert former_counterpart(resolve_recipe(words), made_with) == made_with


def test_a_granularity_that_was_given_before_stays():
    made_with = resolve_recipe(dict(base='w4a4_v1', activation=dict(granularity='per_channel')))
    found = former_counterpart(resolve_recipe('w4a4'), made_with)
    assert found is not None
    assert not recipe_difference({**made_with, 'name': ''}, {**found, 'name': ''})


def test_what_a_former_recipe_could_not_say_stays_a_difference():
    recipe = resolve_recipe(dict(base='w4a4', activation=dict(codes='log2')))
    found = former_counterpart(recipe, FORMER_PRESETS['w4a4'])
    assert found is not None and found['activation']['codes'] == 'log2'


def test_recipes_on_other_presets_and_present_checkpoints_have_no_counterpart():
    former = FORMER_PRESETS['w4a4']
    assert former_counterpart(PRESETS['w4a4'], PRESETS['w4a4']) is None
    assert former_counterpart(PRESETS['gplq_w4a4_paper'], former) is None
    assert former_counterpart({**PRESETS['w4a4'], 'rules': []}, former) is None
