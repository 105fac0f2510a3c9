# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Sensitivities of a model's operands as a page."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..analysis.sensitivity_table import (
    comparison_cells,
    comparison_titles,
    ranked,
    score_text,
)
from .charts import Spec, bits_chart, line_chart
from .layer_rows import short_names
from .rendering import render


def sensitivity_page(
    data: Mapping[str, Any],
    bits: Mapping[str, int] | None = None,
    rows: Sequence[Mapping[str, Any]] = (),
    budget: str = '',
) -> str:
    """The page as text.

    Args:
        data: Content of ``sensitivity.json``.
        bits: Assigned bits by operand key; None without an assignment.
        rows: The assignment and the uniform settings.
        budget: Description of the assignment's limits.

    Raises:
        MissingPackagesError: If a package is missing.
    """
    settings = data['settings']
    images, batches, seed = settings['images']
    kinds = {
        kind: {k: o for k, o in data['operands'].items() if o['kind'] == kind}
        for kind in settings['kinds']
    }
    return render(
        'sensitivity.html.j2',
        unit=data['unit'],
        images=images,
        batches=batches,
        seed=seed,
        budget=budget,
        titles=comparison_titles(data['unit']),
        settings=[comparison_cells(row) for row in rows],
        charts={kind: _charts(data, own, bits) for kind, own in kinds.items() if own},
        candidates=settings['bits'],
        operands=[_operand(data, key, operand, bits) for key, operand in ranked(data)],
        assigned=bits is not None,
    )


def _charts(
    data: Mapping[str, Any], operands: Mapping[str, Any], bits: Mapping[str, int] | None
) -> dict[str, Spec]:
    """Error increase of each operand, a line for each number of bits; and assigned bits.

    An increase of zero or less, which a logarithm has not, is left out.
    """
    names = short_names([operand['name'] for operand in operands.values()])
    rows = [
        {'x': x, 'y': increase, 'name': name, 'series': f'{candidate} bits'}
        for candidate in data['settings']['bits']
        for x, (name, operand) in enumerate(zip(names, operands.values(), strict=True))
        if (increase := operand['damage'][str(candidate)]) > 0
    ]
    axis = 'operand, in model order'
    found = {'Error increase': line_chart(rows, axis, 'error', height=230, log=True, points=True)}
    if bits:
        found['Assigned bits'] = bits_chart(
            [
                {'x': x, 'y': bits[key], 'name': name, 'series': operand['kind']}
                for x, (name, (key, operand)) in enumerate(
                    zip(names, operands.items(), strict=True)
                )
            ]
        )
    return found


def _operand(
    data: Mapping[str, Any], key: str, operand: Mapping[str, Any], bits: Mapping[str, int] | None
) -> list[str]:
    """Cells of the table of all operands."""
    size = operand['weights'] or operand['elements']
    scores = [score_text(operand['score'][str(b)]) for b in data['settings']['bits']]
    return [key, operand['role'], f'{size:,}', *scores, *([str(bits[key])] if bits else [])]
