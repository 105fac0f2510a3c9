# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""What recipes on ``w4a4`` and its like meant before these presets changed."""

from collections.abc import Mapping
from typing import Any

from .presets import FORMER_PRESETS, FORMER_SUFFIX, PRESETS

_NOW, _BEFORE = PRESETS['w4a4'], FORMER_PRESETS['w4a4']
_NEWER = {
    section: set(_NOW[section]) - set(_BEFORE[section])
    for section in ('activation', 'calibration', 'optim')
}
"""Keys that came with the present presets, by section."""
_NEWER_SECTIONS = set(_NOW) - set(_BEFORE)


def is_former(recipe: Mapping[str, Any]) -> bool:
    """Whether a full recipe has none of the keys that came with the present presets.

    Examples:
        >>> is_former(PRESETS['w4a4_v1']), is_former(PRESETS['w4a4'])
        (True, False)
    """
    newer = (set(recipe[section]) & keys for section, keys in _NEWER.items())
    return not (_NEWER_SECTIONS & set(recipe) or any(newer))


def former_counterpart(
    recipe: Mapping[str, Any], made_with: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What the config's recipe meant when a checkpoint's was recorded.

    Args:
        recipe: Full recipe, of the config.
        made_with: Full recipe, of the checkpoint. Its granularity is taken where ``recipe``
            has the preset's, and its numbers of calibration and training where the presets'
            changed.

    Returns:
        A full recipe; None where ``made_with`` is no former recipe, or ``recipe`` does not
        build on a preset that changed.

    Examples:
        >>> former_counterpart(PRESETS['w4a4'], FORMER_PRESETS['w4a4']) == PRESETS['w4a4_v1']
        True
    """
    number = len(_NOW['rules'])
    if not is_former(made_with) or is_former(recipe) or recipe['rules'][:number] != _NOW['rules']:
        return None
    former = {k: v for k, v in recipe.items() if k not in _NEWER_SECTIONS}
    for section in ('calibration', 'optim'):
        former[section] = _section_before(section, recipe[section], made_with[section])
    activation, preset = recipe['activation'], _NOW['activation']
    changed = {k: v for k, v in activation.items() if k not in _NEWER['activation']}
    changed |= {k: activation[k] for k in _NEWER['activation'] if activation[k] != preset[k]}
    if activation['granularity'] == preset['granularity']:
        changed['granularity'] = made_with['activation']['granularity']
    former['activation'] = changed
    if recipe['weight']['ptq'] == _NOW['weight']['ptq']:
        former['weight'] = {**recipe['weight'], 'ptq': made_with['weight']['ptq']}
    former['rules'] = [*_BEFORE['rules'], *recipe['rules'][number:]]
    former['name'] = _former_name(recipe)
    return former


def former_base(recipe: Mapping[str, Any]) -> str:
    """The preset to build on for what a recipe of these bits meant before.

    Examples:
        >>> former_base(PRESETS['w3a3'])
        'w3a3_v1'
    """
    name = f'w{recipe["weight"]["num_bits"]}a{recipe["activation"]["num_bits"]}{FORMER_SUFFIX}'
    return name if name in PRESETS else f'w4a4{FORMER_SUFFIX}'


def _section_before(
    section: str, settings: Mapping[str, Any], made_with: Mapping[str, Any]
) -> dict[str, Any]:
    now, before = _NOW[section], _BEFORE[section]
    changed = {k for k in before if now[k] != before[k]}
    kept = {k: v for k, v in settings.items() if k not in changed | _NEWER[section]}
    return kept | {k: v for k, v in made_with.items() if k in changed}


def _former_name(recipe: Mapping[str, Any]) -> str:
    base, space, rest = recipe['name'].partition(' ')
    if base in FORMER_PRESETS:
        return f'{base}{FORMER_SUFFIX}{space}{rest}'
    return f'{former_base(recipe)}{space}{rest}' if base in PRESETS else recipe['name']
