# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""More bits for roles: in place, as rules, and from a checkpoint."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from gplq_mm.analysis.added_bits import add_bits_, adopt_bits, adopt_rules_, bit_rules_of_roles
from gplq_mm.convert import convert_, quantizers, resolve_recipe
from gplq_mm.quantizers import FakeQuantizer, QuantSpec
from gplq_mm.recipe import as_recipe

AUTO = resolve_recipe(dict(base='auto', scope='all', rules=[dict(name='2', num_bits=8)]))


def make_model(recipe: Any = AUTO) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4), nn.Linear(4, 2))
    convert_(model, recipe)
    return model


def bits(model: nn.Module, kind: str = 'activation') -> list[int]:
    return [q.spec.num_bits for q in quantizers(model, kind).values()]


def test_only_fewer_bits_are_raised_and_only_of_the_roles() -> None:
    model = make_model()
    assert bits(model) == [4, 8, 4]
    assert add_bits_(model, ['post_gelu'], 6) == 0
    assert add_bits_(model, ['input'], 6) == 2
    assert bits(model) == [6, 8, 6]
    assert bits(model, 'weight') == [4, 8, 4]
    for quantizer in quantizers(model, 'activation').values():
        assert tuple(quantizer.quant_range.tolist()) == quantizer.spec.quant_range


@pytest.mark.parametrize('num_bits', [6, 8])
def test_the_rules_build_the_same_model(num_bits: int) -> None:
    model = make_model()
    rules = bit_rules_of_roles(model, ['input'], num_bits)
    add_bits_(model, ['input'], num_bits)
    again = make_model({**AUTO, 'rules': [*AUTO['rules'], *rules]})
    assert [q.spec for q in quantizers(again).values()] == [
        q.spec for q in quantizers(model).values()
    ]
    assert rules[0] == {'role': 'input', 'activation': {'num_bits': num_bits}}
    assert len(rules) == (2 if num_bits == 6 else 1)


def test_a_model_adopts_the_rules_of_a_checkpoint() -> None:
    model = make_model()
    rules = bit_rules_of_roles(model, ['input'], 6)
    made_with = {**AUTO, 'rules': [*AUTO['rules'], *rules]}
    recipe = adopt_rules_(model, as_recipe(AUTO), made_with)
    assert bits(model) == [6, 8, 6]
    assert recipe.as_dict() == made_with


@pytest.mark.parametrize(
    ('own', 'made_with'),
    [
        ({'gate': None}, {}),
        ({}, {'gate': {'action': 'stop'}}),
        ({}, {'rules': [dict(role='input', num_bits=8)]}),
    ],
    ids=['config without', 'checkpoint without', 'other rules'],
)
def test_other_recipes_keep_their_bits(own: dict[str, Any], made_with: dict[str, Any]) -> None:
    model, recipe = make_model(), as_recipe({**AUTO, **own})
    rules = [*AUTO['rules'], dict(role='input', activation=dict(num_bits=6))]
    same = adopt_rules_(model, recipe, {**AUTO, 'rules': rules, **made_with})
    assert bits(model) == [4, 8, 4]
    assert same is recipe


def test_a_hook_adopts_bits_from_a_state_dict() -> None:
    source, model = make_model(), make_model()
    add_bits_(source, ['input'], 6)
    with pytest.raises(ValueError, match='this config has'):
        model.load_state_dict(source.state_dict())
    model.register_load_state_dict_pre_hook(adopt_bits)
    averaged = copy.deepcopy(model)
    for loaded in (model, averaged):
        loaded.load_state_dict(source.state_dict())
        assert bits(loaded) == [6, 8, 6]


def test_fewer_bits_are_not_adopted() -> None:
    source, model = make_model(), make_model()
    add_bits_(model, ['input'], 6)
    adopt_bits(model, source.state_dict(), '')
    assert bits(model) == [6, 8, 6]


def test_a_table_of_levels_changes_with_the_bits() -> None:
    def softmax(num_bits: int) -> nn.Module:
        spec = QuantSpec(num_bits, signed=False, codes='auto')
        quantizer = FakeQuantizer(spec)
        quantizer.role = 'softmax'
        return nn.Sequential(quantizer)

    source, model = softmax(4), softmax(4)
    x = torch.rand(50)
    add_bits_(source, ['softmax'], 6)
    source[0].set_qparams(torch.tensor(0.01), torch.tensor(0.0))  # type: ignore[operator]
    model.register_load_state_dict_pre_hook(adopt_bits)
    model.load_state_dict(source.state_dict())
    assert torch.equal(model(x), source(x))
