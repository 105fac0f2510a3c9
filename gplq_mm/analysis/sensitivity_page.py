# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Sensitivity as text and as one HTML file with inline SVG: no script, no network."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from .report import format_table

_COLORS = ('#9c1127', '#d95f0e', '#c9a400', '#3d9a50', '#2b83ba', '#5e3c99', '#444444')
_STEP, _LEFT, _PLOT, _BITS_PLOT = 15, 64, 230, 70  # pixels
_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1180px; color: #222; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: 2px 10px; text-align: right; border-bottom: 1px solid #e4e4e4; }
th:first-child, td:first-child { text-align: left; }
th { border-bottom: 1px solid #888; } tr.mixed td { font-weight: bold; }
.chart { overflow-x: auto; } svg text { font: 10px system-ui, sans-serif; fill: #333; }
.note { color: #555; max-width: 60em; }
"""


def worst_table(data: Mapping[str, Any], count: int = 10) -> str:
    """The most sensitive operands as plain text, by error increase at the fewest candidate bits.

    Args:
        data: Content of ``sensitivity.json``.
        count: Rows.
    """
    bits = data['settings']['bits']
    rows = [
        [key, *(_score(operand['score'][str(b)]) for b in bits)]
        for key, operand in ranked(data)[:count]
    ]
    return format_table([data['unit'], *(f'{b} bits' for b in bits)], rows)


def comparison_table(rows: Sequence[Mapping[str, Any]], unit: str) -> str:
    """Uniform settings compared with the assignment, as plain text.

    Args:
        rows: Result of ``compare``.
        unit: Unit of the score.
    """
    return format_table(['', *_comparison_titles(unit)], [_comparison_cells(r) for r in rows])


def ranked(data: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Operands with their keys, the most sensitive first."""
    fewest = str(data['settings']['bits'][0])
    return sorted(data['operands'].items(), key=lambda item: -item[1]['damage'][fewest])


def sensitivity_page(
    data: Mapping[str, Any],
    bits: Mapping[str, int] | None = None,
    rows: Sequence[Mapping[str, Any]] = (),
    budget: str = '',
) -> str:
    """The HTML page.

    Args:
        data: Content of ``sensitivity.json``.
        bits: Assigned bits by operand key; None without an assignment.
        rows: The assignment and the uniform settings.
        budget: Description of the assignment's limits.
    """
    settings = data['settings']
    images, batches, seed = settings['images']
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        f'<title>Sensitivity</title><style>{_STYLE}</style></head><body>',
        '<h1>Sensitivity to quantization</h1>',
        f'<p class="note">{html.escape(data["unit"])} when one operand alone is quantized, while '
        f'everything else is float. {images} training images in {batches} batches, seed {seed}. '
        'Higher in the plots is more sensitive. Move the pointer over a dot to see its value.</p>',
    ]
    if rows:
        parts += [f'<h2>Bits under {html.escape(budget)}</h2>', _comparison_html(rows, data)]
    for kind in settings['kinds']:
        own = {k: o for k, o in data['operands'].items() if o['kind'] == kind}
        if own:
            parts += [f'<h2>{kind.capitalize()}s, in model order</h2>', _chart(data, own, bits)]
    parts += ['<h2>All operands, the most sensitive first</h2>', _operand_table(data, bits)]
    return '\n'.join([*parts, '</body></html>', ''])


def _comparison_titles(unit: str) -> list[str]:
    return ['mean W bits', 'mean A bits', 'BOPs (G)', 'size (MiB)', unit]


def _comparison_cells(row: Mapping[str, Any]) -> list[str]:
    means = [row['weight_bits'], row['activation_bits']]
    return [
        row['name'],
        *('-' if mean is None else f'{mean:.2f}' for mean in means),
        f'{row["bops"] / 1e9:,.3f}',
        f'{row["model_bytes"] / 2**20:,.3f}',
        '-' if row['damage'] is None else _score(row['score']),
    ]


def _comparison_html(rows: Sequence[Mapping[str, Any]], data: Mapping[str, Any]) -> str:
    lines = [_row(['', *_comparison_titles(data['unit'])], 'th')]
    for row in rows:
        lines.append(_row(_comparison_cells(row), 'td', 'mixed' if row['name'] == 'mixed' else ''))
    return f'<table>{"".join(lines)}</table>'


def _operand_table(data: Mapping[str, Any], bits: Mapping[str, int] | None) -> str:
    candidates = data['settings']['bits']
    titles = ['operand', 'role', 'size', *(f'{b} bits' for b in candidates)]
    lines = [_row([*titles, *(['assigned'] if bits else [])], 'th')]
    for key, operand in ranked(data):
        size = operand['weights'] or operand['elements']
        cells = [key, operand['role'], f'{size:,}']
        cells += [_score(operand['score'][str(b)]) for b in candidates]
        lines.append(_row([*cells, *([str(bits[key])] if bits else [])], 'td'))
    return f'<table>{"".join(lines)}</table>'


def _row(cells: Sequence[str], tag: str, style: str = '') -> str:
    inside = ''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)
    return f'<tr class="{style}">{inside}</tr>' if style else f'<tr>{inside}</tr>'


def _chart(
    data: Mapping[str, Any], operands: Mapping[str, Any], bits: Mapping[str, int] | None
) -> str:
    """Error increase by operand, log scale, one line per number of bits, and assigned bits."""
    candidates = data['settings']['bits']
    values = [d for o in operands.values() for d in o['damage'].values() if d > 0]
    low = math.floor(math.log10(min(values))) if values else -1
    high = max(math.ceil(math.log10(max(values))) if values else 0, low + 1)
    names = _short_names([o['name'] for o in operands.values()])
    label_room = 12 + 6 * max(map(len, names))
    bottom = _PLOT + (_BITS_PLOT if bits else 0)
    width = _LEFT + _STEP * len(operands) + 70
    shapes = [_axis(low, high, data['settings']['metric'], width)]
    for number, candidate in enumerate(candidates):
        color = _COLORS[number % len(_COLORS)]
        shapes.append(_series(operands, candidate, color, low, high, data['unit']))
        y = 24 + 16 * number
        shapes.append(f'<circle cx="{width - 58}" cy="{y - 3}" r="4" fill="{color}"/>')
        shapes.append(f'<text x="{width - 50}" y="{y}">{candidate} bits</text>')
    if bits:
        shapes.append(_bars(operands, bits, candidates, width))
    for number, name in enumerate(names):
        x = _x(number) + 3
        y = bottom + 8
        shapes.append(
            f'<text x="{x}" y="{y}" text-anchor="end" transform="rotate(-90 {x} {y})">'
            f'{html.escape(name)}</text>'
        )
    return (
        f'<div class="chart"><svg xmlns="http://www.w3.org/2000/svg" width="{width}" '
        f'height="{bottom + label_room}">{"".join(shapes)}</svg></div>'
    )


def _axis(low: int, high: int, metric: str, width: int) -> str:
    every = max(1, math.ceil((high - low) / 8))
    lines = []
    for power in range(low, high + 1, every):
        y = _y(10.0**power, low, high)
        label = f'{-10 * power} dB' if metric == 'sqnr' else f'1e{power}'
        lines.append(
            f'<line x1="{_LEFT}" x2="{width - 70}" y1="{y}" y2="{y}" stroke="#e0e0e0"/>'
            f'<text x="{_LEFT - 6}" y="{y + 3}" text-anchor="end">{label}</text>'
        )
    return ''.join(lines)


def _series(
    operands: Mapping[str, Any], bits: int, color: str, low: int, high: int, unit: str
) -> str:
    points, dots = [], []
    for number, (key, operand) in enumerate(operands.items()):
        increase, score = operand['damage'][str(bits)], operand['score'][str(bits)]
        x, y = _x(number), _y(increase, low, high)
        points.append(f'{x},{y}')
        title = html.escape(f'{key}, {bits} bits: {_score(score)} ({unit})')
        dots.append(
            f'<circle cx="{x}" cy="{y}" r="3.5" fill="{color}"><title>{title}</title></circle>'
        )
    line = f'<polyline points="{" ".join(points)}" fill="none" stroke="{color}" opacity="0.45"/>'
    return line + ''.join(dots)


def _bars(
    operands: Mapping[str, Any], bits: Mapping[str, int], candidates: Sequence[int], width: int
) -> str:
    floor, room = _PLOT + _BITS_PLOT, _BITS_PLOT - 22
    bars = [f'<text x="{_LEFT - 6}" y="{floor - 3}" text-anchor="end">assigned</text>']
    for number, key in enumerate(operands):
        height = room * bits[key] / 8
        known = bits[key] in candidates
        color = _COLORS[candidates.index(bits[key]) % len(_COLORS)] if known else '#999'
        top, x = floor - height, _x(number)
        bars.append(
            f'<rect x="{x - 5}" y="{top:.1f}" width="10" height="{height:.1f}" fill="{color}"/>'
            f'<text x="{x}" y="{top - 3:.1f}" text-anchor="middle">{bits[key]}</text>'
        )
    base = f'<line x1="{_LEFT}" x2="{width - 70}" y1="{floor}" y2="{floor}" stroke="#888"/>'
    return base + ''.join(bars)


def _x(number: int) -> int:
    return _LEFT + _STEP * number + _STEP // 2


def _y(increase: float, low: int, high: int) -> float:
    """Vertical position of an error increase; values up to 0 are at the bottom of the plot."""
    share = (math.log10(increase) - low) / (high - low) if increase > 0 else 0.0
    return round(_PLOT - 14 - (_PLOT - 30) * min(max(share, 0.0), 1.0), 1)


def _short_names(names: Sequence[str]) -> list[str]:
    """Names without their common dotted prefix."""
    if len(names) < 2:
        return list(names)
    split = [name.split('.') for name in names]
    shared = 0
    while all(len(s) > shared + 1 and s[shared] == split[0][shared] for s in split):
        shared += 1
    return ['.'.join(s[shared:]) for s in split]


def _score(value: float | None) -> str:
    return 'no change' if value is None else f'{value:.4g}'
