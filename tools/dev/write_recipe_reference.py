# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Write docs/reference/recipe.md from the dataclasses of the recipe and the weight algorithms.

Example:
    python tools/dev/write_recipe_reference.py
"""

from __future__ import annotations

import functools
import inspect
import operator
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gplq_mm.ptq.algorithms import WEIGHT_PTQ
from gplq_mm.recipe import PRESETS, Recipe, as_recipe
from gplq_mm.recipe.check import Limits, alternatives, describe, is_section
from gplq_mm.recipe.sections.mimic import OF_TYPE, MimicTerm
from gplq_mm.recipe.sections.operand_settings import ActivationSettings, WeightSettings
from gplq_mm.recipe.sections.rule import Rule
from gplq_mm.recipe.sections.run_settings import (
    CalibrationSettings,
    CompensationSettings,
    GateSettings,
    OptimSettings,
    Stage2Settings,
)
from gplq_mm.recipe.sections.section import Section, plain

TARGET = Path(__file__).resolve().parents[2] / 'docs' / 'reference' / 'recipe.md'
PRESET = 'w4a4'
SECTIONS: dict[str, type[Section]] = {
    'activation': ActivationSettings,
    'weight': WeightSettings,
    'rules': Rule,
    'calibration': CalibrationSettings,
    'gate': GateSettings,
    'mimic': MimicTerm,
    'optim': OptimSettings,
    'stage2': Stage2Settings,
    'stage2.compensation': CompensationSettings,
}
"""Dotted key -> the section that it holds."""
HEADER = f"""\
# Keys of a recipe

Written by `tools/dev/write_recipe_reference.py` from the code; a test compares them. How to use
them: [choose what is quantized](../how_to/recipe.md). In a config a key such as `optim.lr` is
`recipe=dict(optim=dict(lr=1e-4))`, on the command line
`--cfg-options model.recipe.optim.lr=1e-4`. *Default* is the value in the preset `{PRESET}`, with
`-` for a key that has none. A key that is unknown, out of range or without effect is an error.
`python -m gplq_mm recipe w4a4` prints a preset with these comments.
"""


def render() -> str:
    """The whole page."""
    preset = as_recipe(PRESET)
    own = dict(Recipe.keys())
    plain_keys = [key for key in own if key not in SECTIONS]
    parts = [HEADER, presets_table(), '## Keys at the top', keys_table(Recipe, preset, plain_keys)]
    for path, section in SECTIONS.items():
        parts += [f'## {path}', (section.__doc__ or '').split('\n\n')[0].replace('``', '`')]
        if path == 'mimic':
            parts.append(_mimic_types())
        parts.append(keys_table(section, _at(preset, path), list(section.keys())))
    return '\n\n'.join(part.strip('\n') for part in [*parts, algorithms()]) + '\n'


def presets_table() -> str:
    """Bits, weight algorithm and gate of each preset; earlier versions left out."""
    rows = []
    for name in PRESETS:
        if not name.endswith('_v1'):
            recipe = as_recipe(name)
            action = recipe.gate.action if recipe.gate else 'no gate'
            algorithm = _code(plain(recipe.weight.ptq))
            bits = f'W{recipe.weight.num_bits}A{recipe.activation.num_bits}'
            rows.append([f'`{name}`', bits, recipe.activation.granularity, algorithm, action])
    titles = ['preset', 'bits', 'input scales', '`weight.ptq`', 'if the gate is not passed']
    text = '## Presets\n\n' + table(titles, rows)
    return f'{text}\n\nWhich one to take: [which preset?](../which_preset.md)'


def keys_table(section: type[Section], values: Any, names: Sequence[str]) -> str:
    """Key, allowed values, default and effect of the keys of a section.

    Args:
        section: The section.
        values: The preset's section of this type; None if it has none.
        names: Keys to list.
    """
    rows = []
    for name in names:
        hint, limits = section.keys()[name]
        rows.append([f'`{name}`', allowed(hint, limits), _default(section, values, name, limits)])
        rows[-1].append(limits.doc)
    return table(['key', 'value', 'default', 'effect'], rows)


def allowed(hint: Any, limits: Limits) -> str:
    """Allowed values of a key, its sections by name."""
    others = tuple(kind for kind in alternatives(hint) if not is_section(kind))
    if len(others) == len(alternatives(hint)):
        return describe(hint, limits)
    rest = [describe(functools.reduce(operator.or_, others), limits)] if others else []
    return ' or '.join(['a dict, see below', *rest])


def _default(section: type[Section], values: Any, name: str, limits: Limits) -> str:
    if values is not None and name in (values.given or ()):
        value = getattr(values, name)
    elif limits.required:
        return '-'
    else:
        value = getattr(section(**_required(section)), name)
    return 'see below' if isinstance(value, Section) else _code(plain(value))


def _required(section: type[Section]) -> dict[str, Any]:
    """Placeholders of the keys without default, so that a section can be made."""
    return {name: None for name, (_, limits) in section.keys().items() if limits.required}


def _at(recipe: Recipe, path: str) -> Any:
    """The recipe's section at a dotted path; None if it has none or a list."""
    found: Any = recipe
    for key in path.split('.'):
        found = getattr(found, key, None)
    return found if isinstance(found, Section) else None


def _mimic_types() -> str:
    order = list(MimicTerm.keys())
    lines = [
        f'* `{kind}`: {", ".join(f"`{key}`" for key in sorted(keys, key=order.index))}'
        for kind, keys in OF_TYPE.items()
    ]
    return 'Keys that have an effect, by `type`:\n\n' + '\n'.join(lines)


def algorithms() -> str:
    """The weight algorithms with their options."""
    rows = []
    for name, kind in sorted(WEIGHT_PTQ.items()):
        options = inspect.signature(kind).parameters.values()
        given = ', '.join(f'{option.name}={option.default!r}' for option in options)
        about = re.split(r'(?<=\.)\s', ' '.join((kind.__doc__ or '').split()))[0]
        rows.append([f'`{name}`', f'`{given}`' if given else '', about.replace('``', '`')])
    text = (
        '## Algorithms of weight.ptq\n\n'
        "`ptq='gptq'`, `ptq=dict(type='gptq', damping=0.03)`, or a list of those that run one "
        'after another; on the command line `--ptq "gptq(damping=0.03)+finetune"`. Measured: '
        '[weight algorithms](../stage2.md).\n\n'
    )
    return text + table(['name', 'options', 'what it does'], rows)


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [titles, ['---'] * len(titles), *rows]
    return '\n'.join('| ' + ' | '.join(c.replace('|', '\\|') for c in row) + ' |' for row in lines)


def _code(value: Any) -> str:
    return f'`{value!r}`'


if __name__ == '__main__':
    TARGET.write_text(render(), encoding='utf-8')
