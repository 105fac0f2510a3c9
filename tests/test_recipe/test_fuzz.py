# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Random recipes, valid and not: an error names its key, and a valid value is kept."""

import copy
import math
import random
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import pytest
from torch import nn

from gplq_mm.convert import convert_
from gplq_mm.recipe import PRESETS, Recipe, Rule, as_recipe, plain
from gplq_mm.recipe.check import Limits, alternatives, is_section

DRAWS = 500
ITEM = {'rules': Rule}
TEXTS = ['x', '*', '*.attn.*', '0']
PTQ = ['gptq', {'type': 'mse'}, ['repq', 'gptq']]


def leaves(section: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Path, type and limits of every key that holds a value, not a section."""
    for key, (hint, limits) in section.keys().items():
        if key in ITEM:
            continue
        inner = next((kind for kind in alternatives(hint) if is_section(kind)), None)
        if inner is not None:
            yield from leaves(inner, (*path, key))
        else:
            yield (*path, key), hint, limits


LEAVES = list(leaves(Recipe))
RULE_LEAVES = [leaf for leaf in leaves(Rule) if leaf[0] != ('weight', 'ptq')]


def valid(rng: random.Random, path: tuple[str, ...], hint: Any, limits: Limits) -> Any:
    """A value that the key's type and limits allow."""
    kind = rng.choice(alternatives(hint))
    if path[-1] == 'ptq':
        return rng.choice(PTQ)
    if get_origin(kind) is Literal:
        return rng.choice(get_args(kind))
    if get_origin(kind) is tuple:
        return [0.5, 0.9] if get_args(kind)[0] is float else [rng.choice(TEXTS)]
    if kind is type(None) or kind is bool:
        return None if kind is type(None) else rng.random() < 0.5
    if kind is str:
        return rng.choice(list(limits.options) or TEXTS)
    if kind is int:
        low = int(limits.minimum or 0)
        return rng.randint(low, int(limits.maximum or low + 100))
    if kind is float:
        return rng.uniform(0.01, min(limits.maximum or 1.0, limits.below or 1.0) * 0.9)
    return {}


def invalid(rng: random.Random, hint: Any, limits: Limits) -> Any:
    """A value that no alternative of the key's type allows."""
    kinds = alternatives(hint)
    wrong: list[Any] = [object(), math.nan, [object()], b'4']
    if bool not in kinds:
        wrong.append(True)
    if str not in kinds or limits.options:
        wrong += ['flase', 'n0']
    if not any(get_origin(kind) is dict for kind in kinds):
        wrong.append({'no': 'such'})
    if int in kinds or float in kinds:
        wrong += [-1, math.inf, '4', -0.5]
    return rng.choice(wrong)


def put(recipe: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    *sections, key = path
    for section in sections:
        recipe = recipe.setdefault(section, {})
    recipe[key] = value


def draw(rng: random.Random) -> tuple[dict[str, Any], list[tuple[tuple[str, ...], Any]]]:
    """A recipe of a few valid changes, and what they are."""
    recipe: dict[str, Any] = {'base': rng.choice(sorted(PRESETS))}
    changes = []
    for path, hint, limits in rng.sample(LEAVES, rng.randint(1, 3)):
        changes.append((path, valid(rng, path, hint, limits)))
        put(recipe, *changes[-1])
    if rng.random() < 0.4:
        rule: dict[str, Any] = {'name': rng.choice(TEXTS)}
        for path, hint, limits in rng.sample(RULE_LEAVES, 2):
            put(rule, path, valid(rng, path, hint, limits))
        recipe['rules'] = [rule]
    return recipe, changes


def spoil(rng: random.Random, recipe: dict[str, Any]) -> str:
    """Make one key wrong, in place; the word that the error has to hold."""
    path, hint, limits = rng.choice(LEAVES)
    if rng.random() < 0.4:
        misspelt = path[-1] + rng.choice(['x', '_', 's'])
        put(recipe, (*path[:-1], misspelt), valid(rng, path, hint, limits))
        return misspelt
    put(recipe, path, invalid(rng, hint, limits))
    return path[-1]


def found_at(recipe: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        recipe = recipe[key]
    return recipe


@pytest.mark.parametrize('seed', range(5))
def test_a_valid_value_is_kept_or_its_key_is_named(seed: int) -> None:
    rng, kept = random.Random(seed), 0
    words = {key for path, *_ in (*LEAVES, *RULE_LEAVES) for key in path}
    for _ in range(DRAWS // 10):
        recipe, changes = draw(rng)
        before = copy.deepcopy(recipe)
        try:
            resolved = as_recipe(recipe)
            convert_(nn.Sequential(nn.Linear(4, 4)), resolved.change(scope='all'))
        except ValueError as error:
            assert any(word in str(error) for word in words), (recipe, error)
        else:
            kept += 1
            assert as_recipe(resolved.as_dict()) == resolved
            assert all(found_at(resolved.as_dict(), path) == plain(v) for path, v in changes)
        assert recipe == before
    assert kept > DRAWS // 50


@pytest.mark.parametrize('seed', range(5))
def test_a_wrong_key_or_value_is_refused_by_its_name(seed: int) -> None:
    rng = random.Random(100 + seed)
    for _ in range(DRAWS // 10):
        recipe = {'base': rng.choice(sorted(PRESETS))}
        word = spoil(rng, recipe)
        with pytest.raises(ValueError, match=word) as found:
            as_recipe(recipe)
        assert '\n' not in str(found.value), recipe
