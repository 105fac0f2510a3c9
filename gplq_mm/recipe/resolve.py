# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""From a preset's name, or overrides of a preset, to a validated recipe."""

from collections.abc import Mapping
from typing import Any

from .check import close_hint
from .presets import PRESETS
from .recipe import Recipe
from .sections.mimic import OF_TYPE
from .sections.section import plain

RecipeLike = str | Mapping[str, Any] | Recipe
"""Forms of a recipe that a config, a checkpoint or a caller may give."""
DEFAULT_BASE = 'w4a4'
_WHOLE = {key for key, (_, limits) in Recipe.keys().items() if limits.required}
"""Keys of a full recipe; a dict with all of them is not merged with a preset. Later keys (``gate``,
``optim.scale_step``, ``optim.vector_lr``, ``calibration.migrate``, ``codes``) have defaults that
reproduce recipes without them."""


def as_recipe(recipe: RecipeLike) -> Recipe:
    """A validated recipe from any of its forms.

    Args:
        recipe: A preset's name, or a dict with ``base`` (a preset's name, default
            ``w4a4``) and any of the recipe's keys. Dicts merge key by key, ``rules``
            are appended to the preset's, other values are replaced. A ``Recipe`` is returned
                unchanged.

    Raises:
        ValueError: For an unknown preset, key or option, a value of another type or out of
            range, and for a key that would have no effect.
        TypeError: If ``recipe`` is neither a name nor a dict.

    Examples:
        >>> as_recipe(dict(base='w4a4', activation=dict(num_bits=3))).activation.num_bits
        3
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str):
        return Recipe.from_dict(_preset(recipe), 'recipe')
    if not isinstance(recipe, Mapping):
        raise TypeError(f"recipe={recipe!r}: write a preset's name such as 'w4a4', or a dict")
    overrides = plain(recipe)
    base = overrides.pop('base', None)
    if base is None and set(overrides) >= _WHOLE:
        return Recipe.from_dict(overrides, 'recipe')
    base = base or DEFAULT_BASE
    full = _merge(_preset(base), overrides)
    if overrides and 'name' not in overrides:
        full['name'] = f'{base} (customized)'
    return Recipe.from_dict(full, 'recipe')


def resolve_recipe(recipe: RecipeLike) -> dict[str, Any]:
    """Full recipe as a plain dict, as in checkpoints and reports.

    Args:
        recipe: As for ``as_recipe``.

    Returns:
        Plain dict with every key; resolving it again changes nothing.

    Raises:
        ValueError: As for ``as_recipe``.
        TypeError: As for ``as_recipe``.

    Examples:
        >>> resolve_recipe('w4a4')['activation']['num_bits']
        4
    """
    return as_recipe(recipe).as_dict()


def recipe_difference(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = '') -> list[str]:
    """Dotted keys in which two recipes differ, with both values.

    Args:
        a: Plain recipe.
        b: Another one.
        prefix: Prefix of the keys.

    Examples:
        >>> recipe_difference(dict(x=dict(y=1)), dict(x=dict(y=2)))
        ['x.y: 1 != 2']
    """
    differences = []
    for key in sorted(set(a) | set(b)):
        left, right = a.get(key), b.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            differences += recipe_difference(left, right, f'{prefix}{key}.')
        elif plain(left) != plain(right):
            differences.append(f'{prefix}{key}: {left!r} != {right!r}')
    return differences


def _preset(name: Any) -> dict[str, Any]:
    if not isinstance(name, str):
        raise TypeError(f"recipe base={name!r}: write a preset's name such as 'w4a4'")
    if name not in PRESETS:
        raise ValueError(
            f'recipe {name!r} is unknown; write one of {sorted(PRESETS)}{close_hint(name, PRESETS)}'
        )
    return plain(PRESETS[name])


def _merge(base: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in overrides.items():
        if key == 'rules' and isinstance(value, list):
            base['rules'] = [*base['rules'], *value]
        elif isinstance(value, Mapping) and isinstance(base.get(key), dict):
            kept = _of_same_type(base[key], value) if key == 'mimic' else base[key]
            base[key] = {**kept, **value}
        else:
            base[key] = value
    return base


def _of_same_type(base: Mapping[str, Any], term: Mapping[str, Any]) -> dict[str, Any]:
    """A preset's mimicking term without keys that the overriding type does not use."""
    kind = term.get('type', base.get('type'))
    used = OF_TYPE.get(kind) if kind is None or isinstance(kind, str) else None
    return {k: v for k, v in base.items() if used is None or k in used}
