# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import copy

import pytest

from gplq_mm.recipe import FORMER_PRESETS, PRESETS, as_recipe
from gplq_mm.recipe.recorded import recorded_recipe

IDLE = {'learn_scale': True, 'observer': 'mse', 'observer_args': {'bins': 9}}


@pytest.mark.parametrize('recipe', [*PRESETS.values(), *FORMER_PRESETS.values()])
def test_a_recipe_without_idle_keys_stays(recipe) -> None:
    assert recorded_recipe(recipe) == recipe
    recipe = copy.deepcopy(recipe)
    recipe['weight'].update(qat=True, learn_scale=True, observer='mse')
    recipe['rules'].append({'name': 'x', 'weight': {'qat': False}, 'activation': {}})
    assert recorded_recipe(recipe) == recipe


def test_what_had_no_effect_is_as_if_it_had_not_been_written() -> None:
    recipe = copy.deepcopy(PRESETS['w4a4'])
    recipe['weight'].update(IDLE)
    bits = {'name': '*', 'num_bits': 8}
    recipe['rules'] += [
        {**bits, 'weight': {**IDLE, 'ptq': 'mse'}},
        {'name': 'x'},
        {'name': 'y', 'weight': {'num_bits': 3, 'learn_scale': True}},
    ]
    run = recorded_recipe(recipe)
    wanted = copy.deepcopy(PRESETS['w4a4'])
    wanted['rules'] += [bits, {'name': 'y', 'weight': {'num_bits': 3}}]
    assert run == wanted == as_recipe(run).as_dict()


def test_a_rule_that_trains_weights_on_their_grid_stays() -> None:
    rule = {'name': '*', 'weight': {'qat': True, **IDLE}}
    assert recorded_recipe({**PRESETS['w4a4'], 'rules': [rule]})['rules'] == [rule]
