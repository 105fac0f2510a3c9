# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Result of the gate, and the message of one that is not passed."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..added_bits import ADD_BITS
from ..report import format_start, format_table
from ..start_error import WEIGHTS, RoleError, StartFigures

COSTLIEST = 2
"""Number of roles that the message names."""


@dataclass(frozen=True)
class GateResult:
    """Result of the gate.

    Attributes:
        images: Number of training images compared.
        limit: ``recipe.gate.max_feature_error``.
        figures: Feature error, agreement and KL divergence of the calibrated model.
        roles: Feature error with each role float; empty if the gate is passed.
    """

    images: int
    limit: float
    figures: StartFigures
    roles: Sequence[RoleError] = ()

    @property
    def passed(self) -> bool:
        """Whether stage 1 may begin; a feature error of NaN is above any limit."""
        return self.figures.feature_error <= self.limit

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the report."""
        roles = {'roles': [asdict(r) for r in self.roles]} if self.roles else {}
        found = {'images': self.images, **self.figures.as_dict(), **roles}
        return {**found, 'limit': self.limit, 'passed': self.passed}

    @property
    def line(self) -> str:
        """The figures in one line."""
        return format_start(self.as_dict())

    @property
    def table(self) -> str:
        """The figures, and the roles with the largest error first, as text."""
        titles = ['role', 'operands', 'feature error with this role float']
        rows = [[r.role, str(r.operands), f'{r.feature_error:.3g}'] for r in self.roles]
        return f'{self.line}\n{format_table(titles, rows)}'


def remedy(result: GateResult, action: str) -> str:
    """One line: what was measured, which roles cause the largest error, what to write.

    Args:
        result: A result above the limit.
        action: ``recipe.gate.action``.
    """
    costliest = result.roles[:COSTLIEST]
    named = ', '.join(
        f'{r.role} (feature error {r.feature_error:.2g} with its {r.operands} operands float)'
        for r in costliest
    )
    rules = ', '.join(f'dict(role={r.role!r}, num_bits=8)' for r in costliest if r.role != WEIGHTS)
    choices = [f'recipe=dict(rules=[{rules}])'] if rules else []
    choices += ["more bits such as recipe='w8a8'"]
    choices += [] if action == ADD_BITS else ["recipe='auto' to have bits added"]
    return (
        f'the calibrated model is too far from the float one to start stage 1: {result.line}; '
        f'these roles cause the largest error: {named}; write {", ".join(choices)}, or '
        "recipe=dict(gate=dict(action='warn')) to train anyway"
    )
