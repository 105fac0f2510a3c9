# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Base class of a recipe's sections: a frozen dataclass read from a dict and stored as one."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar, get_type_hints

from ..check import Limits, close_hint, parse_value

_Section = TypeVar('_Section', bound='Section')


def setting(doc: str, default: Any = dataclasses.MISSING, **limits: Any) -> Any:
    """A key of a section, as a field of its dataclass.

    Args:
        doc: What the key does, in one line; printed by ``python -m gplq_mm recipe``.
        default: Value in a recipe without the key; a key without default is required.
        **limits: Fields of ``Limits``.
    """
    required = default is dataclasses.MISSING
    metadata = {'limits': Limits(doc, required=required, **limits)}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=None if required else default, metadata=metadata)


@dataclass(frozen=True, kw_only=True, eq=False)
class Section:
    """Keys of one part of a recipe. Two sections are equal if they are stored as equal dicts.

    Attributes:
        given: Keys that were given, in order; only these are stored. The others have their
            defaults, as recipes had without them. None for all.
    """

    given: tuple[str, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Set ``given`` to all keys if it is None."""
        if self.given is None:
            object.__setattr__(self, 'given', tuple(self.keys()))

    @classmethod
    def keys(cls) -> dict[str, tuple[Any, Limits]]:
        """Type and limits by key."""
        section: Any = cls  # mypy considers a class with __eq__ unhashable
        return _keys(section)

    @classmethod
    def from_dict(
        cls: type[_Section],
        values: Any,
        path: str = '',
        partial: bool = False,
        refused: Mapping[str, str] | None = None,
    ) -> _Section:
        """Read and check a section.

        Args:
            values: Plain data, as from ``as_dict``.
            path: Dotted name of the section, for errors.
            partial: Whether required keys may be left out.
            refused: Keys that may not be given here, with the reason.

        Raises:
            ValueError: For an unknown or missing key, and for a value of another type, out of
                range, or without effect. The error names the key, the value and what to write.
        """
        keys = cls.keys()
        if not isinstance(values, Mapping):
            raise ValueError(f'{path}={values!r}: write a dict of {sorted(keys)}')
        for key in values:
            _require_known(key, keys, path, refused or {})
        missing = [k for k, (_, limits) in keys.items() if limits.required and k not in values]
        if missing and not partial:
            raise ValueError(f'{path} has no {missing[0]!r}; a full recipe gives it')
        parsed = {k: parse_value(v, *keys[k], f'{path}.{k}') for k, v in values.items()}
        section = cls(**parsed, given=tuple(parsed))
        section.check(path)
        return section

    def check(self, path: str) -> None:
        """Refuse settings that contradict each other.

        Args:
            path: Dotted name of the section, for errors.

        Raises:
            ValueError: If a key would have no effect.
        """

    def as_dict(self) -> dict[str, Any]:
        """The given keys as plain data: the form in checkpoints and reports."""
        return {key: plain(getattr(self, key)) for key in self.given or ()}

    def change(self: _Section, **values: Any) -> _Section:
        """A checked copy with other values.

        Raises:
            ValueError: As for ``from_dict``.
        """
        path = type(self).__name__
        return type(self).from_dict({**self.as_dict(), **plain(values)}, path)

    def overridden_by(self: _Section, other: Mapping[str, Any]) -> _Section:
        """A copy with other, already checked values."""
        given = tuple(dict.fromkeys([*(self.given or ()), *other]))
        return dataclasses.replace(self, **other, given=given)

    @property
    def given_values(self) -> dict[str, Any]:
        """Values of the given keys; sections stay sections."""
        return {key: getattr(self, key) for key in self.given or ()}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and self.as_dict() == other.as_dict()


def plain(value: Any) -> Any:
    """Sections and config containers as new plain dicts and lists.

    Examples:
        >>> plain({'betas': (0.9, 0.99)})
        {'betas': [0.9, 0.99]}
    """
    if isinstance(value, Section):
        return value.as_dict()
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


@cache
def _keys(cls: Any) -> dict[str, tuple[Any, Limits]]:
    hints = get_type_hints(cls)
    fields = [f for f in dataclasses.fields(cls) if 'limits' in f.metadata]
    return {f.name: (hints[f.name], f.metadata['limits']) for f in fields}


def _require_known(
    key: Any, keys: Mapping[str, Any], path: str, refused: Mapping[str, str]
) -> None:
    if key in refused:
        raise ValueError(f'{path}.{key}: {refused[key]}')
    if key not in keys:
        allowed = sorted(set(keys) - set(refused))
        raise ValueError(
            f'{path} has no key {key!r}{close_hint(key, allowed)}; the keys are {allowed}'
        )
