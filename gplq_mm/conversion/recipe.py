# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Recipe: the whole description of a quantization, as plain data."""

import copy
import difflib
import math
from collections.abc import Mapping
from typing import Any

from ..quantizers import (
    OBSERVERS,
    Granularity,
    PerChannel,
    PerRow,
    PerTensor,
    QuantSpec,
    integer_range,
)
from ..quantizers.log_codes import CODES
from .auto_settings import AUTO, may_be_auto
from .match import ROLES
from .presets import PRESETS

SCOPES = {
    'backbone': ('backbone',),
    'backbone+neck': ('backbone', 'neck'),
    'all': ('',),
    'auto': ('',),
}
GRANULARITIES = ('per_tensor', 'per_channel', 'per_row')
_SETTING_KEYS = {
    'num_bits',
    'signed',
    'symmetric',
    'granularity',
    'observer',
    'observer_args',
    'learn_scale',
    'codes',
}
_RATES = ('lr', 'scale_lr', 'weight_decay', 'scale_weight_decay')
_KEYS: dict[str, set[str] | None] = {
    'activation': _SETTING_KEYS | {'enabled'},
    'weight': _SETTING_KEYS | {'enabled', 'ptq', 'qat'},
    'calibration': {'num_images', 'seed', 'batch_size', 'all_if_fewer', 'migrate', 'compensate'},
    'optim': {*_RATES, 'lr_iterations', 'betas', 'train', 'drop_rates', 'scale_step', 'vector_lr'},
    'stage2': None,
}
_GATE_KEYS = {'num_images', 'max_feature_error', 'action'}
SCALE_STEPS = ('relative', 'absolute')
GATE_ACTIONS = ('stop', 'warn', 'add_bits')
_RULE_KEYS = {'name', 'role', 'num_bits', 'enabled', 'activation', 'weight', 'optional'}
_TOP_KEYS = {'name', 'scope', 'rules', 'mimic', *_KEYS}
"""Every recipe has them. Keys that were added later (`gate`, `optim.scale_step`, `optim.vector_lr`,
`calibration.migrate`, `codes`) mean, where they are absent, what recipes did before."""
_OPTIONAL_KEYS = {'gate'}


def resolve_recipe(recipe: str | Mapping[str, Any]) -> dict[str, Any]:
    """Full recipe from a preset's name or from overrides over a preset.

    Args:
        recipe: A preset's name, or a dict with ``base`` (a preset's name, default
            ``w4a4``) and any of the recipe's keys. Dicts merge key by key, ``rules``
            are appended to the preset's, everything else replaces.

    Returns:
        Plain dict that holds every key; resolving it again changes nothing.

    Raises:
        ValueError: For an unknown preset, key, scope, observer or granularity, and
            for bits outside 2 to 8.
        TypeError: If ``recipe`` is neither a name nor a dict.

    Examples:
        >>> resolve_recipe('w4a4')['activation']['num_bits']
        4
        >>> resolve_recipe(dict(base='w4a4', activation=dict(num_bits=3)))['activation']['num_bits']
        3
    """
    if isinstance(recipe, str):
        return _preset(recipe)
    if not isinstance(recipe, Mapping):
        raise TypeError(f"recipe={recipe!r}: write a preset's name such as 'w4a4', or a dict")
    overrides = copy.deepcopy(_plain(recipe))
    resolved = overrides.pop('base', None)
    if resolved is None and set(overrides) >= _TOP_KEYS:
        full = overrides
    else:
        base = resolved or 'w4a4'
        full = _merge(_preset(base), overrides)
        if overrides and 'name' not in overrides:
            full['name'] = f'{base} (customized)'
    _validate(full)
    return full


def spec_from_settings(
    settings: Mapping[str, Any], axis: int | None, row_axis: int | None = None
) -> QuantSpec:
    """Quantizer spec of one operand.

    Args:
        settings: As given by ``RuleBook.resolve``.
        axis: Channel axis for ``per_channel``; None forces per-tensor.
        row_axis: Summed axis for ``per_row``; None where there is none to take a scale from.

    Raises:
        ValueError: For ``per_row`` without ``row_axis``, and for codes that do not fit.
    """
    granularity: Granularity = PerTensor()
    if settings['granularity'] == 'per_row':
        if row_axis is None:
            raise ValueError(
                "granularity='per_row' is for the operands of attention (roles query, key, value, "
                "softmax); write 'per_channel' for the inputs of layers"
            )
        granularity = PerRow(row_axis)
    elif settings['granularity'] != 'per_tensor' and axis is not None:
        granularity = PerChannel(axis)
    return QuantSpec(
        num_bits=settings['num_bits'],
        signed=settings.get('signed', True),
        symmetric=settings.get('symmetric', True),
        granularity=granularity,
        observer=settings.get('observer', 'minmax'),
        learn_scale=settings.get('learn_scale', False),
        observer_args=dict(settings.get('observer_args') or {}),
        codes=settings.get('codes', 'uniform'),
    )


def scope_prefixes(scope: str | list[str]) -> tuple[str, ...]:
    """Name prefixes of a scope.

    Examples:
        >>> scope_prefixes('backbone+neck'), scope_prefixes(['backbone', 'rpn_head'])
        (('backbone', 'neck'), ('backbone', 'rpn_head'))
    """
    if isinstance(scope, str):
        if scope not in SCOPES:
            raise ValueError(
                f'scope={scope!r} is unknown; write one of {sorted(SCOPES)} '
                'or a list of module names'
            )
        return SCOPES[scope]
    if not isinstance(scope, list | tuple) or not all(isinstance(s, str) for s in scope):
        raise ValueError(f"scope={scope!r}: write one of {sorted(SCOPES)} or a list ['backbone']")
    return tuple(scope)


def recipe_difference(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = '') -> list[str]:
    """Dotted keys in which two recipes differ, with both values.

    Examples:
        >>> recipe_difference(dict(x=dict(y=1)), dict(x=dict(y=2)))
        ['x.y: 1 != 2']
    """
    differences = []
    for key in sorted(set(a) | set(b)):
        left, right = a.get(key), b.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            differences += recipe_difference(left, right, f'{prefix}{key}.')
        elif _plain(left) != _plain(right):
            differences.append(f'{prefix}{key}: {left!r} != {right!r}')
    return differences


def _preset(name: str) -> dict[str, Any]:
    if not isinstance(name, str):
        raise TypeError(f"recipe base={name!r}: write a preset's name such as 'w4a4'")
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f'; did you mean {close[0]!r}?' if close else ''
        raise ValueError(f'recipe {name!r} is unknown; write one of {sorted(PRESETS)}{hint}')
    return copy.deepcopy(PRESETS[name])


def _merge(base: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in overrides.items():
        if key == 'rules':
            if not isinstance(value, list):
                raise ValueError(f'recipe.rules={value!r}: write a list of dict(name=..., ...)')
            base['rules'] = [*base['rules'], *value]
        elif isinstance(value, Mapping) and isinstance(base.get(key), dict):
            base[key] = {**base[key], **value}
        else:
            base[key] = value
    return base


def _plain(value: Any) -> Any:
    """Config containers as plain dicts and lists, for comparison and saving."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def _check_keys(where: str, given: Any, allowed: set[str]) -> None:
    if not isinstance(given, Mapping):
        raise ValueError(f'{where}={given!r}: write a dict of {sorted(allowed)}')
    unknown = sorted(set(given) - allowed)
    if unknown:
        raise ValueError(f'{where} has no key {unknown[0]!r}; the keys are {sorted(allowed)}')


def _validate(recipe: dict[str, Any]) -> None:
    _check_keys('recipe', recipe, _TOP_KEYS | _OPTIONAL_KEYS)
    _check_gate(recipe.get('gate'))
    for section, keys in _KEYS.items():
        if keys is not None:
            _check_keys(f'recipe.{section}', recipe[section], keys)
    _check_settings('recipe.activation', recipe['activation'])
    _check_settings('recipe.weight', recipe['weight'])
    scope_prefixes(recipe['scope'])
    for index, rule in enumerate(recipe['rules']):
        where = f'recipe.rules[{index}]'
        _check_keys(where, rule, _RULE_KEYS)
        if 'name' not in rule and 'role' not in rule:
            raise ValueError(
                f"{where}: {rule} names nothing; give name='*.pattern.*' or role='softmax'"
            )
        if rule.get('role', ROLES[0]) not in ROLES:
            raise ValueError(f'{where}: role={rule["role"]!r} is unknown; write one of {ROLES}')
        _check_settings(where, rule)
        for kind in ('activation', 'weight'):
            _check_keys(f'{where}.{kind}', rule.get(kind) or {}, _KEYS[kind] or set())
            _check_settings(f'{where}.{kind}', rule.get(kind) or {})
    _check_calibration(recipe['calibration'])
    _check_optim(recipe['optim'])


def _check_settings(where: str, settings: Mapping[str, Any]) -> None:
    if 'num_bits' in settings:
        try:
            integer_range(settings['num_bits'], True)
        except ValueError as error:
            raise ValueError(f'{where}: {error}') from None
    granularity = settings.get('granularity', 'per_tensor')
    if granularity not in GRANULARITIES:
        raise ValueError(
            f'{where}: granularity={granularity!r} is unknown; write one of {GRANULARITIES}'
        )
    if granularity == 'per_row' and where.endswith('weight'):
        raise ValueError(f"{where}: a weight has no rows to follow; write 'per_channel'")
    if settings.get('codes', 'uniform') not in ('uniform', 'auto', *CODES):
        raise ValueError(
            f'{where}: codes={settings["codes"]!r} is unknown; write one of '
            f'{("uniform", "auto", *CODES)}'
        )
    if settings.get('observer', 'minmax') not in OBSERVERS:
        raise ValueError(
            f'{where}: observer={settings["observer"]!r} is unknown; '
            f'write one of {sorted(OBSERVERS)}'
        )


def _check_calibration(calibration: Mapping[str, Any]) -> None:
    for key in ('num_images', 'batch_size'):
        value = calibration[key]
        if may_be_auto('calibration', key) and value == AUTO:
            continue
        if not _is_int(value) or value < 1:
            raise ValueError(
                f'recipe.calibration.{key}={value!r}: write a positive integer; an empty '
                'calibration set cannot set a range'
            )
    for key in ('migrate', 'compensate'):
        if not isinstance(calibration.get(key, False), bool):
            raise ValueError(f'recipe.calibration.{key}={calibration[key]!r}: write True or False')
    if not _is_int(calibration['seed']) or calibration['seed'] < 0:
        raise ValueError(
            f'recipe.calibration.seed={calibration["seed"]!r}: write an integer from 0'
        )


def _check_gate(gate: Any) -> None:
    if gate is None:
        return
    _check_keys('recipe.gate', gate, _GATE_KEYS)
    number, limit = gate.get('num_images', 32), gate.get('max_feature_error', 0.5)
    if not _is_int(number) or number < 1:
        raise ValueError(f'recipe.gate.num_images={number!r}: write a positive integer')
    if not _is_rate(limit):
        raise ValueError(
            f'recipe.gate.max_feature_error={limit!r}: write a number from 0, e.g. 0.5'
        )
    if gate.get('action', 'stop') not in GATE_ACTIONS:
        raise ValueError(f'recipe.gate.action={gate["action"]!r}: write one of {GATE_ACTIONS}')


def _check_optim(optim: Mapping[str, Any]) -> None:
    if optim.get('scale_step', 'absolute') not in SCALE_STEPS:
        raise ValueError(
            f'recipe.optim.scale_step={optim["scale_step"]!r}: write one of {SCALE_STEPS}'
        )
    if optim.get('scale_step') == 'relative' and optim['scale_weight_decay']:
        raise ValueError(
            f'recipe.optim.scale_weight_decay={optim["scale_weight_decay"]!r} has no effect on '
            "steps in proportion to the scales; write 0.0, or scale_step='absolute'"
        )
    for key in _RATES:
        if not (_is_rate(optim[key]) or (may_be_auto('optim', key) and optim[key] == AUTO)):
            raise ValueError(f'recipe.optim.{key}={optim[key]!r}: write a number from 0')
    vector_lr = optim.get('vector_lr')
    if not (vector_lr is None or vector_lr == AUTO or _is_rate(vector_lr)):
        raise ValueError(
            f'recipe.optim.vector_lr={vector_lr!r}: write a number from 0 for steps of biases and '
            f"gains in proportion to themselves, None for those of the weights, or '{AUTO}'"
        )
    iterations = optim.get('lr_iterations', 0)
    if iterations != AUTO and not (_is_int(iterations) and iterations >= 0):
        raise ValueError(
            f"recipe.optim.lr_iterations={iterations!r}: write an integer from 0, or '{AUTO}'"
        )
    betas = optim['betas']
    pair = isinstance(betas, list | tuple) and len(betas) == 2 and all(map(_is_rate, betas))
    if not (pair or betas == AUTO):
        raise ValueError(f"recipe.optim.betas={betas!r}: write two numbers, or '{AUTO}'")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
