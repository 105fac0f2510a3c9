# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Figures of a report as rows of a table: FP32, both stages, and what was lost."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..analysis.report import STAGES, bits_label

MAIN_METRICS = ('coco/bbox_mAP', 'accuracy/top1', 'multi-label/mAP', 'mIoU')
"""What a model is judged by, in this order; without any of them the first metric counts."""
LOWER_IS_BETTER = re.compile(r'(^|[/_])(loss|error|mae|mse|fid)($|[/_])', re.IGNORECASE)
_CLASS_AP = re.compile(r'^(?:coco/)?(.+)_precision$')
"""Metric of one class, with ``CocoMetric(classwise=True)``."""
MODEL_SIZE, FILE_SIZE = 'size of the model (MiB)', 'packed file (MiB)'
LATENCY, OPERATIONS = 'latency (ms)', 'bit operations (G)'
ABSENT = -1.0
"""COCO's value of a metric that no object counts for."""


Units = list[tuple[str, Callable[[Mapping[str, Any]], Any], float]]
"""Name of a quantity, how a stage's entry gives it, and its unit."""


@dataclass(frozen=True)
class Row:
    """One quantity of the stages.

    Attributes:
        name: Its name, with the unit.
        values: By stage; a stage without it is missing.
        texts: The same as text.
        changes: Difference to FP32 as text, by stage.
        verdict: ``better``, ``worse`` or empty, of the last stage.
    """

    name: str
    values: Mapping[str, float]
    texts: Mapping[str, str]
    changes: Mapping[str, str]
    verdict: str = ''


def titles(report: Mapping[str, Any]) -> dict[str, str]:
    """Titles of the stages that a report has: FP32, W32A4, W4A4."""
    return {s: bits_label(report['recipe'], s) for s in STAGES if s in report}


def metric_rows(report: Mapping[str, Any]) -> list[Row]:
    """All metrics except those of single classes and those that no object counts for."""
    names = dict.fromkeys(n for s in STAGES for n in report.get(s, {}).get('metrics', {}))
    rows = [_metric(report, name) for name in names if not _CLASS_AP.match(name)]
    return [row for row in rows if row.values]


def main_metric(report: Mapping[str, Any]) -> Row | None:
    """The metric that a model is judged by, None before the first score."""
    rows = {row.name: row for row in metric_rows(report)}
    first = next(iter(rows.values()), None)
    return next((rows[name] for name in MAIN_METRICS if name in rows), first)


def class_rows(report: Mapping[str, Any]) -> list[Row]:
    """Score of each class, the one that lost most first.

    Accuracy by class that a run counts itself, or the average precision that mmdet adds with
    ``val_evaluator.classwise=True``.
    """
    found: dict[str, dict[str, float]] = {}
    for stage in STAGES:
        about = report.get(stage, {})
        for name, value in about.get('per_class', {}).items():
            found.setdefault(name, {})[stage] = value
        for name, value in about.get('metrics', {}).items():
            match = _CLASS_AP.match(name)
            if match and value != ABSENT:
                found.setdefault(match[1], {})[stage] = value
    rows = [_row(name, values, _score) for name, values in found.items()]
    last = [s for s in STAGES if s in report][-1:] or ['']
    return sorted(rows, key=lambda row: _lost(row, last[0]))


def cost_rows(report: Mapping[str, Any]) -> list[Row]:
    """Size, bits, operations, latency, time and memory."""
    units: Units = [
        (MODEL_SIZE, lambda s: s.get('model_bytes'), 2**20),
        (FILE_SIZE, lambda s: s.get('disk_bytes'), 2**20),
        (LATENCY, lambda s: s.get('latency_ms'), 1),
        (OPERATIONS, lambda s: s.get('bops'), 1e9),
        ('mean bits of weights', lambda s: s.get('mean_bits', {}).get('weight'), 1),
        ('mean bits of activations', lambda s: s.get('mean_bits', {}).get('activation'), 1),
    ]
    return _cost_rows(report, units, compare=True)


def effort_rows(report: Mapping[str, Any]) -> list[Row]:
    """Time and memory that each stage took; an FP32 model is only scored."""
    units: Units = [
        ('time (s)', lambda s: s.get('seconds'), 1),
        ('peak memory (MiB)', lambda s: s.get('peak_memory_bytes'), 2**20),
    ]
    return _cost_rows(report, units, compare=False)


def _cost_rows(
    report: Mapping[str, Any],
    units: Units,
    compare: bool,
) -> list[Row]:
    rows = []
    for name, get, unit in units:
        found = {s: get(report.get(s, {})) for s in STAGES}
        if name == FILE_SIZE and found['stage2']:  # of FP32: what its weights would take
            found['fp32'] = report.get('fp32', {}).get('model_bytes')
        values = {s: float(value) / unit for s, value in found.items() if value is not None}
        if values:
            rows.append(_row(name, values, _quantity, compare=compare, as_ratio=True))
    return rows


def _metric(report: Mapping[str, Any], name: str) -> Row:
    found = {s: report.get(s, {}).get('metrics', {}).get(name) for s in STAGES}
    values = {s: float(v) for s, v in found.items() if v is not None and v != ABSENT}
    sign = -1 if LOWER_IS_BETTER.search(name) else 1
    return _row(name, values, _score, sign)


def _row(
    name: str,
    values: Mapping[str, float],
    text: Callable[[float], str],
    sign: int = 0,
    compare: bool = True,
    as_ratio: bool = False,
) -> Row:
    """A row; ``sign`` is 1 where more is better, -1 where less is, 0 where neither is said."""
    base, changes, verdict = values.get('fp32'), {}, ''
    for stage, value in values.items():
        if stage == 'fp32' or base is None or not compare:
            continue
        if as_ratio:
            changes[stage] = ratio_text(base, value)
        else:
            changes[stage] = difference_text(value - base)
            verdict = {0: '', 1: 'better', -1: 'worse'}[_sign(value - base) * (sign or 1)]
    return Row(name, values, {s: text(v) for s, v in values.items()}, changes, verdict)


def _sign(value: float) -> int:
    return (value > 5e-5) - (value < -5e-5)


def difference_text(value: float) -> str:
    """A difference with its sign, rounded as the metrics are.

    Examples:
        >>> difference_text(0.004), difference_text(-1.25), difference_text(0.0)
        ('+0.004', '-1.25', '0')
    """
    if not _sign(value):
        return '0'
    return f'{"+" if value > 0 else "-"}{_score(abs(value))}'


def ratio_text(base: float, value: float) -> str:
    """By how much a cost fell or rose.

    Examples:
        >>> ratio_text(8.0, 2.0), ratio_text(2.0, 3.0), ratio_text(2.0, 2.0)
        ('4.00x less', '1.50x more', '')
    """
    if base <= 0 or value <= 0 or abs(base / value - 1) < 5e-3:
        return ''
    return f'{base / value:.2f}x less' if base > value else f'{value / base:.2f}x more'


def _lost(row: Row, stage: str) -> float:
    return row.values.get(stage, 0.0) - row.values.get('fp32', 0.0) if row.changes else 0.0


def _score(value: float) -> str:
    """Metrics in percent have two digits, shares of one have four."""
    return f'{value:.2f}' if abs(value) > 1 else f'{value:.4f}'.rstrip('0').rstrip('.') or '0'


def _quantity(value: float) -> str:
    return f'{value:,.1f}' if value >= 100 else f'{value:,.2f}'
