# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The recipes that `accuracy.py` compares, and variants of them given on the command line."""

import ast
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gplq_mm.convert import PRESETS, resolve_recipe, settle_auto
from gplq_mm.distillation.mimic_settings import resolve_mimic
from gplq_mm.integrations.mm.launch.errors import ConfigError

PAPER = 'gplq_w4a4_paper'
SCHEDULES = ('cosine', 'constant')
_BITS = re.compile(r'^w([2-8])a([2-8])$')
_OWN_KEYS = ('schedule', 'epochs')
_TRAINED_WEIGHTS = {'qat': True, 'learn_scale': True}


@dataclass(frozen=True)
class Recipe:
    """One line of the comparison.

    Attributes:
        name: Label in the table.
        family: `ours` (presets `wXaY`) or `paper`.
        overrides: Keys of a GPLQ recipe that override the family's preset.
        schedule: `cosine` (from the recipe's learning rate to 0) or `constant` (the paper's).
        epochs: Epochs of stage 1; None: those of the command line.
        options: Config options, dotted names and their values.
        bits: The only bits it is used with, such as `w3a3`; None for all selected ones.
    """

    name: str
    family: str = 'ours'
    overrides: Mapping[str, Any] = field(default_factory=dict)
    schedule: str = 'cosine'
    epochs: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    bits: str | None = None

    def preset(self, bits: str) -> str:
        """Name of the preset that the recipe starts from at these bits."""
        preset = f'gplq_{bits}_paper' if self.family == 'paper' else bits
        return preset if preset in PRESETS else {'paper': PAPER, 'ours': 'w4a4'}[self.family]

    def resolve(self, bits: str, batch_size: int) -> dict[str, Any]:
        """The full GPLQ recipe at `bits`.

        Args:
            bits: Such as `w4a4`.
            batch_size: Images per step over all GPUs; the paper's learning rate depends on it.
        """
        weight, activation = parse_bits(bits)
        given = _copy(self.overrides)
        for part, number in (('weight', weight), ('activation', activation)):
            given[part] = {'num_bits': number, **given.get(part, {})}
        if self.family == 'paper':
            lr = paper_lr(batch_size)
            given['optim'] = {'lr': lr, 'scale_lr': lr, **given.get('optim', {})}
        return resolve_recipe({'base': self.preset(bits), 'name': f'{self.name} {bits}', **given})


def _paper(name: str, **overrides: Any) -> Recipe:
    return Recipe(name, 'paper', overrides, schedule='constant')


_NO_TRAINING = {'mimic': None, 'weight': {'ptq': 'mse'}, 'stage2': {'compensation': None}}
_LR = {'lr': 5e-4}  # fixed: a baseline does not change with the presets
RECIPES = {
    recipe.name: recipe
    for recipe in (
        # calibrated, weights rounded to nearest, nothing trained
        Recipe('rtn', overrides=_NO_TRAINING, epochs=0),
        # weights and activations quantized from the first step, task loss
        Recipe('direct', overrides={'mimic': None, 'weight': _TRAINED_WEIGHTS, 'optim': _LR}),
        _paper('paper'),
        Recipe('ours'),
        _paper('paper-no-mimic', mimic=None),
        _paper('paper-per-tensor', activation={'granularity': 'per_tensor'}),
        _paper('paper-no-qwt', stage2={'compensation': None}),
        _paper('paper-direct', weight=_TRAINED_WEIGHTS, stage2={'compensation': None}),
        Recipe('ours-direct', overrides={'weight': _TRAINED_WEIGHTS}),
    )
}
DEFAULT = ('rtn', 'direct', 'paper', 'ours')


def paper_lr(batch_size: int) -> float:
    """The paper's learning rate: 5e-6 for a batch of 128 (arXiv 2506.11784, 4.1)."""
    if batch_size >= 128:
        return 5e-6
    return 2.5e-6 if batch_size >= 64 else 1e-6


def parse_bits(bits: str) -> tuple[int, int]:
    """Weight and activation bits of a name such as `w4a8`.

    Raises:
        ConfigError: If it is no such name.
    """
    match = _BITS.match(bits)
    if match is None:
        raise ConfigError(f'bits {bits!r}: write wXaY with 2 to 8 bits, such as w4a4')
    return int(match[1]), int(match[2])


def parse_recipe(text: str) -> Recipe:
    """A known recipe's name, or a variant `NAME=BASE[:BITS][,key=value ...]`.

    Args:
        text: `BASE` is a known recipe (`base` means `ours`); keys are dotted names of a GPLQ
            recipe, `schedule`, `epochs`, or `cfg.` and a config option.

    Raises:
        ConfigError: If the base, the schedule or the form is unknown.
    """
    name, equals, spec = text.partition('=')
    if not equals:
        base, _, bits = name.partition(':')
        return replace(_known(base), bits=bits or None) if bits else _known(base)
    head, *pairs = _split(spec)
    base, _, bits = head.partition(':')
    if bits:
        parse_bits(bits)
    known = _known('ours' if base == 'base' else base)
    overrides, options = _copy(known.overrides), _copy(known.options)
    own: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition('=')
        if not equals:
            raise ConfigError(f'{text}: {pair!r} is no key=value')
        if key in _OWN_KEYS:
            own[key] = _value(value)
        elif key.startswith('cfg.'):
            options[key[4:]] = _value(value)
        else:
            _set(overrides, key, _value(value))
    found = replace(
        known, name=name, overrides=overrides, options=options, bits=bits or known.bits, **own
    )
    if found.schedule not in SCHEDULES:
        raise ConfigError(f'{text}: schedule={found.schedule!r}; write one of {SCHEDULES}')
    return found


def settled(
    recipe: Mapping[str, Any], is_detector: bool, has_logits: bool | None = None
) -> dict[str, Any]:
    """A recipe without its name, and with the values that replace `auto`.

    Equal recipes have the same fingerprint; a preset whose values changed has another one.

    Args:
        recipe: Resolved recipe.
        is_detector: Whether the model is a detector or a segmentor.
        has_logits: See `resolve_mimic`.
    """
    meant = settle_auto(recipe, is_detector).as_dict()
    meant['mimic'] = resolve_mimic(recipe['mimic'], is_detector, has_logits=has_logits)
    del meant['name']
    return meant


def stage1_part(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that stage 1 depends on; those of weights only if it trains their grid."""
    part = {k: v for k, v in recipe.items() if k != 'stage2'}
    settings = [recipe['weight'], *(rule.get('weight') or {} for rule in recipe['rules'])]
    if any(s.get('qat') for s in settings):
        return part
    part['weight'] = _float_part(recipe['weight'])
    part['rules'] = [
        {**rule, 'weight': _float_part(rule.get('weight') or {})} for rule in recipe['rules']
    ]
    return part


def fingerprint(*parts: Any) -> str:
    """Short hash of plain data."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _float_part(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {k: settings[k] for k in ('enabled',) if k in settings}


def _copy(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {k: dict(v) if isinstance(v, Mapping) else v for k, v in settings.items()}


def _known(name: str) -> Recipe:
    if name not in RECIPES:
        raise ConfigError(
            f'recipe {name!r} is unknown; write one of {sorted(RECIPES)}, or a variant such as '
            "'name=ours:w3a3,optim.lr=1e-4,mimic.type=logits'"
        )
    return RECIPES[name]


def _split(text: str) -> list[str]:
    """Split at the commas outside brackets."""
    parts, depth = [''], 0
    for letter in text:
        depth += (letter in '([{') - (letter in ')]}')
        if letter == ',' and depth == 0:
            parts.append('')
        else:
            parts[-1] += letter
    return parts


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _set(target: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split('.')
    for parent in parents:
        inner = target.get(parent)
        target[parent] = target = dict(inner) if isinstance(inner, Mapping) else {}
    target[last] = value
