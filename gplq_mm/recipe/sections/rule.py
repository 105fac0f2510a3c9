# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""A rule: other settings for the operands of some layers or roles."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from ...quantizers.functional import MAX_BITS, MIN_BITS
from .operand_settings import ActivationSettings, WeightSettings
from .section import Section, setting

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
"""Roles of quantized operands: ``input`` of a layer; ``image`` for the first
convolution; ``post_gelu``/``post_relu`` inside an FFN; ``query``, ``key``,
``value``, ``softmax`` and ``rel_pos`` in attention; ``predictor`` for the last
layer of a head."""
_SHARED = ('num_bits', 'enabled')
_ONE_ALGORITHM = (
    'stage 2 quantizes all weights by one algorithm, a rule cannot give another; write '
    'recipe=dict(weight=dict(ptq=...)), and here at most num_bits, granularity or qat'
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rule(Section):
    """Settings for operands that match a name and role; the last matching rule wins."""

    name: str = setting("which layers: shell pattern of dotted names, e.g. '*.attn.*'", '*')
    role: str | None = setting('which operands, by role', None, options=ROLES)
    num_bits: int = setting(
        'bits of activation and weight', None, minimum=MIN_BITS, maximum=MAX_BITS
    )
    enabled: bool = setting('False keeps the layers float', True)
    activation: ActivationSettings | None = setting('settings of activations', None, partial=True)
    weight: WeightSettings | None = setting(
        'settings of weights', None, partial=True, refused={'ptq': _ONE_ALGORITHM}
    )
    optional: bool = setting('True: no error if nothing matches', False)

    def check(self, path: str) -> None:
        """Refuse a rule that has no name and role, or no setting.

        Raises:
            ValueError: Says what is missing.
        """
        if not {'name', 'role'} & set(self.given or ()):
            raise ValueError(
                f"{path}: {self.as_dict()} names nothing; give name='*.pattern.*' or role='softmax'"
            )
        if not (self.settings_of('activation') or self.settings_of('weight')):
            raise ValueError(
                f'{path}: {self.as_dict()} changes nothing; give num_bits, enabled, '
                'activation=dict(...) or weight=dict(...)'
            )

    def settings_of(self, kind: str) -> dict[str, Any]:
        """Settings that the rule gives operands of a kind.

        Args:
            kind: ``activation`` or ``weight``.

        Examples:
            >>> rule = Rule.from_dict({'role': 'image', 'num_bits': 8, 'weight': {'num_bits': 6}})
            >>> rule.settings_of('activation'), rule.settings_of('weight')
            ({'num_bits': 8}, {'num_bits': 6})
        """
        shared = {key: getattr(self, key) for key in _SHARED if key in (self.given or ())}
        own = self.activation if kind == 'activation' else self.weight
        return {**shared, **(own.given_values if own is not None else {})}

    def matches(self, name: str, role: str) -> bool:
        """Whether the rule matches an operand.

        Args:
            name: Dotted layer name.
            role: One of ``ROLES``.

        Examples:
            >>> rule = Rule.from_dict({'name': '*.attn.*', 'role': 'softmax', 'num_bits': 8})
            >>> rule.matches('layers.0.attn.pv.lhs', 'softmax'), rule.matches('attn', 'input')
            (True, False)
        """
        return fnmatchcase(name, self.name) and self.role in (None, role)
