# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Check one value against its key's type, range and options, and describe them in errors."""

import difflib
import math
import types
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Union, get_args, get_origin


@dataclass(frozen=True)
class Limits:
    """Allowed values of a key besides its type, and its description.

    Attributes:
        doc: What the key does, in one line.
        options: Allowed strings; empty for any.
        minimum: Smallest allowed number.
        maximum: Largest allowed number.
        above: Exclusive lower bound.
        below: Exclusive upper bound.
        required: A full recipe must have the key.
        partial: The key's dict may leave out required keys.
        refused: Keys that the key's dict may not have, with the reason.
        write: What to write, if the type alone does not say it.
    """

    doc: str
    options: Collection[str] = ()
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    required: bool = False
    partial: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)
    write: str = ''

    def holds(self, number: float) -> bool:
        """Whether a number is finite and in the range."""
        return (
            math.isfinite(number)
            and (self.minimum is None or number >= self.minimum)
            and (self.maximum is None or number <= self.maximum)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types that a key may have.

    Examples:
        >>> alternatives(int | None)
        (<class 'int'>, <class 'NoneType'>)
    """
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def is_section(hint: Any) -> bool:
    """Whether a type is a section of the recipe, a dict with its own keys."""
    return hasattr(hint, 'from_dict')


def parse_value(value: Any, hint: Any, limits: Limits, path: str) -> Any:
    """A value converted to its key's type: sections to dataclasses, lists to tuples.

    Args:
        value: Plain data.
        hint: Type of the key.
        limits: Range and options of the key.
        path: Dotted name of the key, for the error.

    Raises:
        ValueError: If the value has another type, is out of range, or is none of the options.

    Examples:
        >>> parse_value(4, int, Limits('bits', minimum=2), 'num_bits')
        4
        >>> parse_value('yes', bool, Limits('switch'), 'symmetric')
        Traceback (most recent call last):
        ...
        ValueError: symmetric='yes': write True or False
    """
    for kind in alternatives(hint):
        if is_section(kind) and isinstance(value, Mapping):
            return kind.from_dict(value, path, limits.partial, limits.refused)
        if get_origin(kind) is tuple and isinstance(value, list | tuple):
            items = _parse_items(value, kind, limits, path)
            if items is not None:
                return items
        elif _accepts(value, kind, limits):
            return value
    close = close_hint(value, _known(hint, limits))
    raise ValueError(f'{path}={value!r}: write {describe(hint, limits)}{close}')


def describe(hint: Any, limits: Limits) -> str:
    """Description of the values allowed for a key.

    Examples:
        >>> describe(int | Literal['auto'], Limits('images', minimum=1))
        "a positive integer or 'auto'"
    """
    if limits.write:
        return limits.write
    words = [_describe(kind, limits) for kind in alternatives(hint)]
    return ' or '.join([', '.join(words[:-1]), words[-1]] if len(words) > 1 else words)


def close_hint(value: Any, known: Iterable[str]) -> str:
    """Suggestion of a similar key or option for the end of an error; empty if none is similar.

    Examples:
        >>> close_hint('obsever', ['observer', 'codes'])
        "; did you mean 'observer'?"
    """
    close = difflib.get_close_matches(value, list(known), n=1) if isinstance(value, str) else []
    return f'; did you mean {close[0]!r}?' if close else ''


def _parse_items(
    value: list | tuple, kind: Any, limits: Limits, path: str
) -> tuple[Any, ...] | None:
    """A list as a tuple; None if its items have another type."""
    first, *rest = get_args(kind)
    if is_section(first):
        inner = replace(limits, write='')
        return tuple(parse_value(v, first, inner, f'{path}[{i}]') for i, v in enumerate(value))
    inner = limits if first in (int, float) else Limits('')
    if rest != [Ellipsis] and len(value) != 1 + len(rest):
        return None
    fits = all(any(_accepts(v, k, inner) for k in alternatives(first)) for v in value)
    return tuple(value) if fits else None


def _accepts(value: Any, kind: Any, limits: Limits) -> bool:
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if kind is type(None):
        return value is None
    if kind is bool:
        return isinstance(value, bool)
    if kind in (int, float):
        number = int if kind is int else int | float
        return isinstance(value, number) and not isinstance(value, bool) and limits.holds(value)
    if kind is str:
        return isinstance(value, str) and (not limits.options or value in limits.options)
    return get_origin(kind) is dict and isinstance(value, Mapping)


def _known(hint: Any, limits: Limits) -> list[str]:
    literals = [k for k in alternatives(hint) if get_origin(k) is Literal]
    return [*limits.options, *(option for k in literals for option in get_args(k))]


def _describe(kind: Any, limits: Limits) -> str:
    if is_section(kind):
        return f'a dict of {sorted(kind.keys())}'
    if get_origin(kind) is tuple:
        first, *rest = get_args(kind)
        if is_section(first):
            return 'a list of such dicts'
        if rest == [Ellipsis]:
            return "a list of names such as ['backbone']" if first is str else 'a list'
        return f'two of {_describe(first, limits)}'
    if get_origin(kind) is Literal:
        return _one_of(get_args(kind))
    if kind is str:
        return _one_of(limits.options) if limits.options else 'a string'
    plain = {type(None): 'None', bool: 'True or False'}
    return plain[kind] if kind in plain else _describe_number(kind, limits)


def _one_of(options: Collection[str]) -> str:
    names = tuple(options)
    return repr(names[0]) if len(names) == 1 else f'one of {names}'


def _describe_number(kind: Any, limits: Limits) -> str:
    if kind not in (int, float):
        return 'a dict'
    noun = 'an integer' if kind is int else 'a number'
    if limits.minimum == 1 and limits.maximum is None:
        return f'a positive {noun.split()[1]}'
    if limits.above == 0 and limits.maximum is None:
        return f'a positive {noun.split()[1]}'
    parts = [
        f'{word} {bound:g}'
        for word, bound in (
            ('from', limits.minimum),
            ('above', limits.above),
            ('to', limits.maximum),
            ('below', limits.below),
        )
        if bound is not None
    ]
    return ' '.join([noun, *parts])
