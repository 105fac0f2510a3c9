# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
from typing import Any

import pytest

from gplq_mm.recipe import PRESETS, plain
from gplq_mm.recipe.schema import recipe_schema

TYPES = {'object': dict, 'array': list, 'string': str, 'boolean': bool, 'null': type(None)}


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """The part of JSON schema that the recipe's uses."""
    if 'anyOf' in schema:
        return any(fits(value, one) for one in schema['anyOf'])
    if 'enum' in schema:
        return isinstance(value, str) and value in schema['enum']
    if schema['type'] in ('integer', 'number'):
        number = int if schema['type'] == 'integer' else int | float
        return (
            isinstance(value, number)
            and not isinstance(value, bool)
            and value >= schema.get('minimum', value)
            and value <= schema.get('maximum', value)
            and not value <= schema.get('exclusiveMinimum', value - 1)
            and not value >= schema.get('exclusiveMaximum', value + 1)
        )
    if not isinstance(value, TYPES[schema['type']]):
        return False
    if isinstance(value, list):
        return all(fits(v, schema['items']) for v in value)
    if isinstance(value, dict) and 'properties' in schema:
        known = schema['properties']
        return all(k in known and fits(v, known[k]) for k, v in value.items())
    return True


@pytest.mark.parametrize('name', PRESETS)
def test_presets_fit(name: str) -> None:
    assert fits(name, recipe_schema()) and fits(plain(PRESETS[name]), recipe_schema())


@pytest.mark.parametrize(
    'recipe',
    [
        'w4a5',
        dict(weights={}),
        dict(weight=dict(num_bits=9)),
        dict(activation=dict(enabled='no')),
        dict(optim=dict(betas=[0.9, 1.0])),
        dict(rules=[dict(name='*', weight=dict(ptq='mse'))]),
        dict(mimic=dict(type='logits', temperature=0)),
    ],
)
def test_wrong_ones_do_not(recipe: Any) -> None:
    assert not fits(recipe, recipe_schema())


def test_every_key_is_described() -> None:
    def described(schema: dict[str, Any]) -> None:
        for one in (schema, *schema.get('anyOf', ()), schema.get('items', {})):
            for key, value in one.get('properties', {}).items():
                assert value['description'], key
                described(value)

    described(recipe_schema())
