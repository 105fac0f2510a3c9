# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""A recipe as text with one comment per key: YAML, or Python as in a config."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .recipe import Recipe
from .sections.section import Section, plain


@dataclass(frozen=True)
class Style:
    """How a language writes keys, sections and lists.

    Attributes:
        value: Writes a plain value in one line.
        entry: A key with such a value.
        section: Opens a section.
        items: Opens a list of sections.
        item: Opens a section of the list.
        end: Closes a section; None if indentation does.
        end_items: Closes a list.
    """

    value: Callable[[Any], str]
    entry: str
    section: str
    items: str
    item: str
    end: str | None = None
    end_items: str | None = None


def yaml_value(value: Any) -> str:
    """A plain value in one line of YAML.

    Examples:
        >>> yaml_value({'type': 'gptq', 'asymmetric': True, 'lr': [1e-06, None]})
        "{type: 'gptq', asymmetric: true, lr: [1.0e-06, null]}"
    """
    if isinstance(value, Mapping):
        return '{' + ', '.join(f'{k}: {yaml_value(v)}' for k, v in value.items()) + '}'
    if isinstance(value, list):
        return '[' + ', '.join(map(yaml_value, value)) + ']'
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    text = json.dumps(value)
    if isinstance(value, float) and 'e' in text and '.' not in text:
        return text.replace('e', '.0e')  # YAML reads 1e-06 as a string
    return text


STYLES = {
    'yaml': Style(yaml_value, '{}: {}', '{}:', '{}:', '-'),
    'python': Style(repr, '{}={},', '{}=dict(', '{}=[', 'dict(', '),', '],'),
}


def recipe_text(recipe: Recipe, style: str = 'yaml') -> str:
    """A recipe with one comment for each key, at its first occurrence.

    Args:
        recipe: Recipe to write.
        style: ``yaml``, or ``python`` for ``recipe = dict(...)``.

    Examples:
        >>> from gplq_mm.recipe import as_recipe
        >>> print(recipe_text(as_recipe('w4a4')).splitlines()[1])
        scope: 'auto'
    """
    writer = _Writer(STYLES[style])
    if style == 'yaml':
        lines = list(writer.keys(recipe, 0))
    else:
        lines = ['recipe = dict(', *writer.keys(recipe, 4), ')']
    return '\n'.join(lines) + '\n'


@dataclass
class _Writer:
    style: Style
    told: set[tuple[type, str]] = field(default_factory=set)

    def keys(self, section: Section, indent: int) -> Iterator[str]:
        """Lines of a section's keys."""
        space = ' ' * indent
        for key, value in section.given_values.items():
            if (type(section), key) not in self.told:
                self.told.add((type(section), key))
                yield f'{space}# {section.keys()[key][1].doc}'
            if isinstance(value, Section):
                yield space + self.style.section.format(key)
                yield from self.block(value, indent)
            elif isinstance(value, tuple) and value and isinstance(value[0], Section):
                yield from self.items(key, value, indent)
            else:
                yield space + self.style.entry.format(key, self.style.value(plain(value)))

    def items(self, key: str, sections: tuple[Section, ...], indent: int) -> Iterator[str]:
        """Lines of a list of sections."""
        space = ' ' * indent
        yield space + self.style.items.format(key)
        for section in sections:
            yield f'{space}    {self.style.item}'
            yield from self.block(section, indent + 4)
        if self.style.end_items is not None:
            yield space + self.style.end_items

    def block(self, section: Section, indent: int) -> Iterator[str]:
        """Lines of a section after the one that opens it."""
        yield from self.keys(section, indent + 4)
        if self.style.end is not None:
            yield ' ' * indent + self.style.end
