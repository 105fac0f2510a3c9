# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Report of a run: ``gplq_report.json``, and its table."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..stream.stored_file import unfinished_file

STAGES = ('fp32', 'stage1', 'stage2')
REPORT_NAME = 'gplq_report.json'
_COCO = re.compile('AP|AR@')
"""Names of COCO's metrics."""
DEPLOYED = (
    ('disk_bytes', 'on disk (MiB)', 2**20),
    ('latency_ms', 'latency (ms)', 1),
    ('latency_ratio', 'speed (x FP32)', 1),
)
"""Key, row and unit of the figures of the deployed model, in reports that have them."""


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON to a temporary file and rename it."""
    with unfinished_file(path) as unfinished:
        unfinished.write_text(json.dumps(data, indent=2, default=float) + '\n')


def read_json(path: Path) -> dict[str, Any]:
    """The dict in ``path``, or an empty one if there is no such file.

    Raises:
        ValueError: If the file holds no JSON dict; it is never damaged by a killed run.
    """
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text())
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f'{path} is damaged: {error}; remove it, and start again') from error
    if not isinstance(data, dict):
        raise ValueError(f'{path} holds no JSON object; remove it, and start again')
    return data


def bits_label(recipe: Mapping[str, Any], stage: str) -> str:
    """Column title of a stage.

    Examples:
        >>> recipe = dict(activation=dict(num_bits=4), weight=dict(num_bits=3, qat=False))
        >>> [bits_label(recipe, stage) for stage in STAGES]
        ['FP32', 'W32A4', 'W3A4']
        >>> bits_label({**recipe, 'rules': [dict(name='fc', weight=dict(num_bits=2))]}, 'stage2')
        'WmixA4'
    """
    activation, weight = (_common_bits(recipe, kind) for kind in ('activation', 'weight'))
    if stage == 'fp32':
        return 'FP32'
    if stage == 'stage1':
        trained = _trained_weights(recipe)
        weight = weight if trained == {True} else 'mix' if True in trained else 32
    return f'W{weight}A{activation}'


def _trained_weights(recipe: Mapping[str, Any]) -> set[bool]:
    """Whether stage 1 trains weights on their grid, by the recipe's own setting or a rule."""
    rules = [rule.get('weight') or {} for rule in recipe.get('rules', [])]
    own = bool(recipe['weight'].get('qat'))
    return {own, *(bool(rule['qat']) for rule in rules if 'qat' in rule)}


def _common_bits(recipe: Mapping[str, Any], kind: str) -> int | str:
    """Bits of a kind; ``mix`` if rules other than the preset's own set other bits."""
    common = recipe[kind]['num_bits']
    rules = [r for r in recipe.get('rules', []) if 'name' in r or not r.get('optional')]
    own = [{**r, **(r.get(kind) or {})} for r in rules]
    return 'mix' if any(r.get('num_bits', common) != common for r in own) else common


def scope_line(report: Mapping[str, Any]) -> str:
    """Recipe, scope and coverage of a report in one line.

    Examples:
        >>> coverage = dict(counts=dict(linear=2), kept_float=[dict(name='x', reason='y')])
        >>> scope_line(dict(recipe=dict(name='w4a4', scope='backbone'), coverage=coverage))
        'recipe w4a4, scope backbone: 2 linear quantized, 1 left float'
    """
    recipe, coverage = report['recipe'], report['coverage']
    counts = ', '.join(f'{number} {kind}' for kind, number in coverage['counts'].items())
    left = len(coverage['kept_float'])
    return (
        f'recipe {recipe["name"]}, scope {recipe["scope"]}: {counts} quantized, {left} left float'
    )


def format_start(gate: Mapping[str, Any]) -> str:
    """Figures of a run's gate in one line.

    Args:
        gate: ``calibration.gate`` of a report.

    Examples:
        >>> format_start(dict(images=32, feature_error=0.09, limit=0.5, agreement=0.97, kl=0.03))
        'feature error 0.09 (limit 0.5), agreement 97 %, KL 0.03 on 32 training images'
    """
    parts = [f'feature error {gate["feature_error"]:.2g} (limit {gate["limit"]:g})']
    levels = gate.get('levels', ())
    if len(levels) > 1:
        parts.append(f'by level {", ".join(f"{level:.2g}" for level in levels)}')
    if 'rpn_error' in gate:
        parts.append(f'RPN scores {gate["rpn_error"]:.2g}')
    if 'agreement' in gate:
        parts.append(f'agreement {100 * gate["agreement"]:.0f} %, KL {gate["kl"]:.2g}')
    return f'{", ".join(parts)} on {gate["images"]} training images'


def report_table(report: Mapping[str, Any]) -> str:
    """The report as a table, one column per stage: metrics, size, BOPs, time, memory, latency.

    A finished run has a column with the metrics' change. Metrics that no image has (COCO's -1) are
    left out.

    Args:
        report: Content of ``gplq_report.json``; missing stages are left out.
    """
    stages = [s for s in STAGES if s in report]
    titles = ['', *(bits_label(report['recipe'], s) for s in stages)]
    names: list[str] = []
    for stage in stages:
        names += [n for n in report[stage]['metrics'] if n not in names]
    values = {n: [_metric(n, report[s]['metrics'].get(n)) for s in stages] for n in names}
    values = {n: row for n, row in values.items() if any(value is not None for value in row)}
    rows = [[n, *map(_number, row)] for n, row in values.items()]
    memory = [_scaled(report[s].get('peak_memory_bytes'), 2**20) for s in stages]
    rows += [
        ['size (MiB)', *(_scaled(report[s].get('model_bytes'), 2**20) for s in stages)],
        ['BOPs (G)', *(_scaled(report[s].get('bops'), 1e9) for s in stages)],
        ['time (s)', *(_scaled(_seconds_of_making(report, s), 1) for s in stages)],
        ['peak memory (MiB)', *memory],
    ]
    for key, title, unit in DEPLOYED:
        if any(key in report[s] for s in stages):
            rows.append([title, *(_scaled(report[s].get(key), unit) for s in stages)])
    if values and {'fp32', 'stage2'} <= set(stages):
        titles.append(f'{titles[-1]} - FP32')
        changes = [_change(row[0], row[-1]) for row in values.values()]
        rows = [
            [*row, change]
            for row, change in zip(rows, [*changes, *['-'] * len(rows)], strict=False)
        ]
    return format_table(titles, rows)


def _seconds_of_making(report: Mapping[str, Any], stage: str) -> float | None:
    """Seconds that made a model: of training, of quantizing the weights; FP32 was only scored."""
    return None if stage == 'fp32' else report[stage].get('seconds')


def _metric(name: str, value: float | None) -> float | None:
    """A metric's value; None for COCO's -1: the images have no such object."""
    return None if value == -1 and _COCO.search(name) else value


def _change(before: float | None, after: float | None) -> str:
    return '-' if before is None or after is None else f'{float(after) - float(before):+.3g}'


def format_table(titles: list[str], rows: list[list[str]]) -> str:
    """Plain text table; first column left, the others right.

    Examples:
        >>> print(format_table(['', 'a'], [['x', '1.0']]))
        |   |   a |
        |---|-----|
        | x | 1.0 |
    """
    widths = [max(len(row[i]) for row in [titles, *rows]) for i in range(len(titles))]

    def line(row: list[str]) -> str:
        cells = [
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        return '| ' + ' | '.join(cells) + ' |'

    rule = '|' + '|'.join('-' * (w + 2) for w in widths) + '|'
    return '\n'.join([line(titles), rule, *(line(row) for row in rows)])


def _number(value: Any) -> str:
    return '-' if value is None else f'{float(value):.4g}'


def _scaled(value: Any, unit: float) -> str:
    return '-' if value is None else f'{float(value) / unit:,.2f}'
