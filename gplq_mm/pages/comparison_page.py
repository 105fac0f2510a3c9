# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The page that compares finished runs: their figures, what differs in their recipes, curves."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..analysis.report import STAGES, bits_label
from .charts import COLORS, Spec, line_chart
from .figures import Row, cost_rows, metric_rows
from .layer_rows import sqnr_rows
from .rendering import render, write_page
from .run_files import RunFiles, read_run
from .training_curves import curves


def write_comparison(reports: Sequence[Path], out: Path) -> Path:
    """Write the page that compares runs.

    Args:
        reports: Paths of their JSON reports.
        out: File to write.

    Returns:
        The file.

    Raises:
        MissingPackagesError: If a package is missing.
        ValueError: If a report is none of a run.
    """
    write_page(out, comparison_page([read_run(path) for path in reports]))
    return out


def comparison_page(runs: Sequence[RunFiles]) -> str:
    """The page as text.

    Args:
        runs: What their work dirs hold; runs of the same name get a number.
    """
    named = {_unique(runs, i): run for i, run in enumerate(runs)}
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(named)}
    return render(
        'comparison.html.j2',
        runs=list(named),
        colors=colors,
        labels={n: f'{i} {_label(run.report)}' for i, (n, run) in enumerate(named.items(), 1)},
        tables={'metric': _table(named, metric_rows), 'cost': _table(named, cost_rows)},
        recipes=recipe_differences({n: run.report['recipe'] for n, run in named.items()}),
        curves=_curves(named, colors),
        ratios=_ratios(named, colors),
    )


def recipe_differences(recipes: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Keys whose values differ between runs, dotted, with the value of each run.

    Examples:
        >>> recipe_differences({'a': dict(weight=dict(num_bits=4)), 'b': {}})
        {'weight.num_bits': {'a': '4', 'b': '-'}}
    """
    flat = {name: dict(_flat(recipe)) for name, recipe in recipes.items()}
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    found = {key: {name: flat[name].get(key, '-') for name in flat} for key in keys}
    return {key: values for key, values in found.items() if len(set(values.values())) > 1}


def _flat(value: Any, prefix: str = '') -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f'{prefix}.{key}' if prefix else key)
    else:
        yield prefix, str(value)


def _unique(runs: Sequence[RunFiles], index: int) -> str:
    name = runs[index].name
    earlier = sum(run.name == name for run in runs[:index])
    return f'{name} ({earlier + 1})' if earlier else name


def _label(report: Mapping[str, Any]) -> str:
    return bits_label(report['recipe'], _last(report))


def _last(report: Mapping[str, Any]) -> str:
    return next((s for s in STAGES[::-1] if report.get(s)), 'fp32')


def _table(named: Mapping[str, RunFiles], rows_of: Any) -> dict[str, dict[str, dict[str, Any]]]:
    """By quantity and run: value after the last stage, its text, FP32's text, the change."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for name, run in named.items():
        last = _last(run.report)
        rows: list[Row] = rows_of(run.report)
        for row in rows:
            if last in row.values:
                table.setdefault(row.name, {})[name] = {
                    'value': row.values[last],
                    'text': row.texts[last],
                    'was': row.texts.get('fp32', ''),
                    'change': row.changes.get(last, ''),
                    'verdict': row.verdict,
                }
    return table


def _curves(named: Mapping[str, RunFiles], colors: Mapping[str, str]) -> dict[str, Spec]:
    """Training curves of all runs in one chart for each term."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, run in named.items():
        for term, points in curves(run.scalars).items():
            found.setdefault(term, []).extend({**point, 'series': name} for point in points)
    return {
        term: line_chart(rows, y='', points=len(rows) < 30 * len(named), colors=colors)
        for term, rows in found.items()
    }


def _ratios(named: Mapping[str, RunFiles], colors: Mapping[str, str]) -> dict[str, Spec]:
    """SQNR along the depth, one chart for each quantity."""
    titles = {'weight': 'Weights after stage 2', 'output': 'Outputs after calibration'}
    found: dict[str, Spec] = {}
    for series, title in titles.items():
        rows = [
            {**row, 'series': name}
            for name, run in named.items()
            for row in sqnr_rows(run.report)
            if row['series'] == series
        ]
        if rows:
            axis = 'layer, in model order'
            found[title] = line_chart(rows, axis, 'dB', height=220, points=True, colors=colors)
    return found
