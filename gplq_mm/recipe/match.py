# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Rules over layer names in order: the last match wins, every rule must have an effect."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from .sections.operand_settings import OBSERVER_KEYS, OperandSettings
from .sections.rule import Rule

_Operand = TypeVar('_Operand', bound=OperandSettings)


def sets_bits(rules: Iterable[Rule], kind: str, name: str, role: str) -> bool:
    """Whether a rule, not the recipe's own setting, sets an operand's bits.

    Args:
        rules: Rules of the recipe.
        kind: ``activation`` or ``weight``.
        name: Dotted name of the operand that rules match.
        role: One of ``ROLES``.

    Examples:
        >>> sets_bits([Rule.from_dict(dict(role='image', num_bits=8))], 'weight', 'stem', 'image')
        True
        >>> rule = Rule.from_dict(dict(name='stem', activation=dict(num_bits=8)))
        >>> sets_bits([rule], 'weight', 'stem', 'input')
        False
    """
    return any(rule.matches(name, role) and 'num_bits' in rule.settings_of(kind) for rule in rules)


def in_scope(name: str, scope: Sequence[str]) -> bool:
    """Whether a dotted name has one of the scope's prefixes; ``''`` is the whole model.

    Examples:
        >>> in_scope('backbone.conv', ['backbone']), in_scope('backbone2', ['backbone'])
        (True, False)
    """
    return any(p == '' or name == p or name.startswith(p + '.') for p in scope)


class RuleBook:
    """Rules in order, with the number of operands on which each has an effect.

    Args:
        rules: Rules of the recipe; those with ``optional=True`` (presets' own) may
            match nothing.
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = list(rules)
        self.hits = [0] * len(self.rules)

    def resolve(self, base: _Operand, kind: str, name: str, role: str) -> _Operand:
        """Settings of one operand: ``base`` overridden by every matching rule in order.

        Args:
            base: The recipe's ``activation`` or ``weight`` settings.
            kind: ``activation`` or ``weight``.
            name: Dotted layer name.
            role: One of ``ROLES``.
        """
        given: dict[int, dict[str, Any]] = {
            index: rule.settings_of(kind)
            for index, rule in enumerate(self.rules)
            if rule.matches(name, role)
        }
        settings = base
        for values in given.values():
            settings = settings.with_rule(values)
        idle = () if settings.is_observed else OBSERVER_KEYS
        for index, values in given.items():
            self.hits[index] += bool(set(values) - set(idle))
        return settings

    def unmatched(self) -> Iterable[Rule]:
        """Rules that must have an effect and have none."""
        for rule, hits in zip(self.rules, self.hits, strict=True):
            if hits == 0 and not rule.optional:
                yield rule
