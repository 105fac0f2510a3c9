# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Ordered rules over layer names: the last match wins, every rule must match."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

ROLES = (
    'input',
    'image',
    'post_gelu',
    'post_relu',
    'query',
    'key',
    'value',
    'softmax',
    'rel_pos',
    'predictor',
)
"""What a quantized operand is: ``input`` of a layer; ``image`` for the first
convolution; ``post_gelu``/``post_relu`` inside an FFN; ``query``, ``key``,
``value``, ``softmax`` and ``rel_pos`` in attention; ``predictor`` for the last
layer of a head."""


def matches(rule: Mapping[str, Any], name: str, role: str) -> bool:
    """Whether a rule applies to a layer operand.

    Args:
        rule: May hold ``name`` (shell pattern on the dotted layer name) and ``role``.
        name: Dotted layer name.
        role: One of ``ROLES``.

    Examples:
        >>> matches(dict(name='*.attn.*'), 'backbone.layers.0.attn.qkv', 'input')
        True
        >>> matches(dict(name='*.attn.*', role='softmax'), 'backbone.layers.0.attn.qkv', 'input')
        False
    """
    return fnmatchcase(name, rule.get('name', '*')) and rule.get('role', role) == role


def sets_bits(rules: Iterable[Mapping[str, Any]], kind: str, name: str, role: str) -> bool:
    """Whether a rule, not the recipe's own setting, decides an operand's bits.

    Args:
        rules: Rules of the recipe.
        kind: ``activation`` or ``weight``.
        name: Dotted name of the operand, as rules see it.
        role: One of ``ROLES``.

    Examples:
        >>> sets_bits([dict(role='image', num_bits=8)], 'weight', 'stem', 'image')
        True
        >>> sets_bits([dict(name='stem', activation=dict(num_bits=8))], 'weight', 'stem', 'input')
        False
    """
    return any(
        matches(rule, name, role) and ('num_bits' in rule or 'num_bits' in (rule.get(kind) or {}))
        for rule in rules
    )


def in_scope(name: str, scope: Sequence[str]) -> bool:
    """Whether a dotted name lies in one of the scope's prefixes; ``''`` is the whole model.

    Examples:
        >>> in_scope('backbone.conv', ['backbone']), in_scope('backbone2', ['backbone'])
        (True, False)
    """
    return any(p == '' or name == p or name.startswith(p + '.') for p in scope)


class RuleBook:
    """Rules in order, counting what each matched.

    Args:
        rules: Rules of the recipe; those with ``optional=True`` (presets' own) may
            match nothing.
    """

    def __init__(self, rules: Sequence[Mapping[str, Any]]) -> None:
        self.rules = list(rules)
        self.hits = [0] * len(self.rules)

    def resolve(self, base: Mapping[str, Any], kind: str, name: str, role: str) -> dict[str, Any]:
        """Settings of one operand: ``base`` overridden by every matching rule in order.

        Args:
            base: The recipe's ``activation`` or ``weight`` settings.
            kind: ``activation`` or ``weight``.
            name: Dotted layer name.
            role: One of ``ROLES``.

        Returns:
            Settings with ``enabled`` (default True).
        """
        settings: dict[str, Any] = {'enabled': True, **base}
        for index, rule in enumerate(self.rules):
            if not matches(rule, name, role):
                continue
            self.hits[index] += 1
            shared = {k: rule[k] for k in ('num_bits', 'enabled') if k in rule}
            settings.update(shared)
            settings.update(rule.get(kind) or {})
        return settings

    def unmatched(self) -> Iterable[Mapping[str, Any]]:
        """Rules that had to match and did not."""
        for rule, hits in zip(self.rules, self.hits, strict=True):
            if hits == 0 and not rule.get('optional', False):
                yield rule
