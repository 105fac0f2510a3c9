# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""JSON schema of the recipe in a config, generated from the sections' fields."""

from typing import Any, Literal, get_args, get_origin

from .check import Limits, alternatives, is_section
from .presets import PRESETS
from .recipe import Recipe

_BASE = 'preset that the other keys override'
_BOUNDS = {
    'minimum': 'minimum',
    'maximum': 'maximum',
    'above': 'exclusiveMinimum',
    'below': 'exclusiveMaximum',
}
_PLAIN: dict[Any, str] = {type(None): 'null', bool: 'boolean'}


def recipe_schema() -> dict[str, Any]:
    """Schema of a preset's name, or of a dict of overrides.

    Examples:
        >>> recipe_schema()['anyOf'][1]['properties']['weight']['properties']['num_bits']['type']
        'integer'
    """
    overrides = _section(Recipe, Limits('overrides of a preset'))
    base = {'enum': sorted(PRESETS), 'description': _BASE}
    overrides['properties'] = {'base': base, **overrides['properties']}
    return {
        '$schema': 'https://json-schema.org/draft/2020-12/schema',
        'title': 'gplq_mm recipe',
        'anyOf': [{'enum': sorted(PRESETS)}, overrides],
    }


def _section(section: Any, limits: Limits) -> dict[str, Any]:
    keys = {k: v for k, v in section.keys().items() if k not in limits.refused}
    properties = {k: {'description': own.doc, **_key(hint, own)} for k, (hint, own) in keys.items()}
    return {'type': 'object', 'properties': properties, 'additionalProperties': False}


def _key(hint: Any, limits: Limits) -> dict[str, Any]:
    found = [_kind(kind, limits) for kind in alternatives(hint)]
    return found[0] if len(found) == 1 else {'anyOf': found}


def _kind(kind: Any, limits: Limits) -> dict[str, Any]:
    if is_section(kind):
        return _section(kind, limits)
    if get_origin(kind) is Literal:
        return {'enum': list(get_args(kind))}
    if get_origin(kind) is tuple:
        return _array(kind, limits)
    if kind in _PLAIN:
        return {'type': _PLAIN[kind]}
    if kind is str:
        return {'enum': list(limits.options)} if limits.options else {'type': 'string'}
    return _number(kind, limits) if kind in (int, float) else {'type': 'object'}


def _array(kind: Any, limits: Limits) -> dict[str, Any]:
    first, *rest = get_args(kind)
    own = limits if first is float else Limits('')
    size = {} if rest == [Ellipsis] else {'minItems': 1 + len(rest), 'maxItems': 1 + len(rest)}
    return {'type': 'array', 'items': _key(first, own), **size}


def _number(kind: Any, limits: Limits) -> dict[str, Any]:
    bounds = {name: getattr(limits, key) for key, name in _BOUNDS.items()}
    given = {name: bound for name, bound in bounds.items() if bound is not None}
    return {'type': 'integer' if kind is int else 'number', **given}
