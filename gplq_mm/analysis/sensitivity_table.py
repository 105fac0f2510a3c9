# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Sensitivities and assigned bits as plain text."""

from collections.abc import Mapping, Sequence
from typing import Any

from .report import format_table


def worst_table(data: Mapping[str, Any], count: int = 10) -> str:
    """The most sensitive operands as plain text, by error increase at the fewest candidate bits.

    Args:
        data: Content of ``sensitivity.json``.
        count: Rows.
    """
    bits = data['settings']['bits']
    rows = [
        [key, *(score_text(operand['score'][str(b)]) for b in bits)]
        for key, operand in ranked(data)[:count]
    ]
    return format_table([data['unit'], *(f'{b} bits' for b in bits)], rows)


def comparison_table(rows: Sequence[Mapping[str, Any]], unit: str) -> str:
    """Uniform settings compared with the assignment, as plain text.

    Args:
        rows: Result of ``compare``.
        unit: Unit of the score.
    """
    return format_table(['', *comparison_titles(unit)], [comparison_cells(r) for r in rows])


def ranked(data: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Operands with their keys, the most sensitive first."""
    fewest = str(data['settings']['bits'][0])
    return sorted(data['operands'].items(), key=lambda item: -item[1]['damage'][fewest])


def comparison_titles(unit: str) -> list[str]:
    """Titles of the columns after the name of a setting."""
    return ['mean W bits', 'mean A bits', 'BOPs (G)', 'size (MiB)', unit]


def comparison_cells(row: Mapping[str, Any]) -> list[str]:
    """Name and figures of a setting, one row of ``compare``."""
    means = [row['weight_bits'], row['activation_bits']]
    return [
        row['name'],
        *('-' if mean is None else f'{mean:.2f}' for mean in means),
        f'{row["bops"] / 1e9:,.3f}',
        f'{row["model_bytes"] / 2**20:,.3f}',
        '-' if row['damage'] is None else score_text(row['score']),
    ]


def score_text(value: float | None) -> str:
    """A score, or that nothing changed."""
    return 'no change' if value is None else f'{value:.4g}'
