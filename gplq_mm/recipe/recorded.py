# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Recipes of old checkpoints, some of whose keys had no effect."""

from collections.abc import Mapping
from typing import Any

from .sections.section import plain

_OF_A_GRID: dict[str, Any] = {
    'qat': False,
    'learn_scale': False,
    'observer': 'minmax',
    'observer_args': {},
}
"""Values of these weight keys if the weights are not trained on a grid."""


def recorded_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's recipe as it was run: keys without effect are reset or removed.

    Args:
        recipe: Full recipe as a plain dict, as in a checkpoint.

    Examples:
        >>> recorded_recipe({'weight': {'num_bits': 4, 'learn_scale': True, 'qat': False}})
        {'weight': {'num_bits': 4, 'learn_scale': False, 'qat': False}}
    """
    run = plain(recipe)
    weight = run.get('weight', {})
    is_trained = _is_trained(weight)
    if not is_trained:
        weight.update({k: v for k, v in _OF_A_GRID.items() if k in weight})
    weight.pop('codes', None)  # uniform: the conversion refused others
    if 'rules' in run:
        rules = [_recorded_rule(rule, is_trained) for rule in run['rules']]
        run['rules'] = [rule for rule in rules if set(rule) - {'name', 'role', 'optional'}]
    return run


def _recorded_rule(rule: dict[str, Any], is_trained: bool) -> dict[str, Any]:
    weight = rule.get('weight') or {}
    kept = {k: v for k, v in weight.items() if k not in ('ptq', 'codes')}
    if not (is_trained or _is_trained(weight)):
        kept = {k: v for k, v in kept.items() if k not in _OF_A_GRID}
    if kept == weight:
        return rule
    rest = {k: v for k, v in rule.items() if k != 'weight'}
    return {**rest, 'weight': kept} if kept else rest


def _is_trained(weight: Mapping[str, Any]) -> bool:
    return bool(weight.get('qat') and weight.get('learn_scale'))
