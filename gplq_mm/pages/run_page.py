# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The page of one run: what was lost, how it was made, and where the error is."""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from ..analysis.report import STAGES, format_start, scope_line
from ..recipe import as_recipe
from ..recipe.text import recipe_text
from .charts import Spec, bits_chart, grid_histogram, line_chart, moves_chart
from .coverage_tree import MOST_OPEN_FLOATS, coverage_tree
from .figures import (
    FILE_SIZE,
    LATENCY,
    MODEL_SIZE,
    OPERATIONS,
    Row,
    class_rows,
    cost_rows,
    effort_rows,
    main_metric,
    metric_rows,
    titles,
)
from .layer_rows import bits_rows, layer_table, short_names, sqnr_rows
from .rendering import render, write_page
from .run_files import RunFiles, page_path, read_run
from .training_curves import curves

MOST_CLASSES = 10
RELOAD_SECONDS = 60


def write_run_page(report: Path, running: bool = False, out: Path | None = None) -> Path:
    """Write the page of a run.

    Args:
        report: Path of its JSON report.
        running: Whether the run goes on; the page then reloads itself.
        out: File to write; beside the report if None.

    Returns:
        The file.

    Raises:
        MissingPackagesError: If a package is missing.
        ValueError: If the report is none of a run.
    """
    path = out or page_path(report)
    write_page(path, run_page(read_run(report), running))
    return path


def run_page(run: RunFiles, running: bool = False) -> str:
    """The page of a run as text.

    Args:
        run: What its work dir holds.
        running: Whether the run goes on.
    """
    report = run.report
    tree = coverage_tree(report)
    return render(
        'run.html.j2',
        name=run.name,
        reload_seconds=RELOAD_SECONDS if running else 0,
        written=datetime.now().strftime('%Y-%m-%d %H:%M'),
        stages=titles(report),
        tiles=tiles(report),
        tables=[metric_rows(report), cost_rows(report), effort_rows(report)],
        classes=class_rows(report),
        most_classes=MOST_CLASSES,
        progress=progress(report),
        scope=scope_line(report),
        about=about(report),
        recipe=_recipe_text(report),
        versions=report.get('versions', {}),
        warnings=[*run.warnings, *report.get('stage2', {}).get('notes', ())],
        curves=_curve_charts(run),
        scales=_scales_chart(report),
        depth=_depth_charts(report),
        layers=layer_table(report),
        histograms=_histograms(report),
        tree=tree,
        open_floats=tree.floats <= MOST_OPEN_FLOATS,
        outside=_outside(report),
        examples=run.examples,
    )


def tiles(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """The figures at the top: title, value of the last stage, FP32's value, and the change."""
    last = next((s for s in STAGES[::-1] if report.get(s)), 'fp32')
    metric = main_metric(report)
    found = [] if metric is None else [_tile(metric, metric.name, list(metric.values)[-1])]
    rows = {row.name: row for row in cost_rows(report)}
    if last != 'fp32':
        names = (FILE_SIZE if FILE_SIZE in rows else MODEL_SIZE), LATENCY, OPERATIONS
        found += [_tile(rows[n], n, last) for n in names if n in rows and last in rows[n].values]
    bits = report.get(last, {}).get('mean_bits')
    if bits:
        text = ' '.join(f'{kind[0].upper()}{value:.2f}' for kind, value in bits.items())
        found.append({**_EMPTY_TILE, 'title': 'mean bits', 'value': text})
    return found


_EMPTY_TILE = {'title': '', 'value': '', 'was': '', 'change': '', 'verdict': ''}


def _tile(row: Row, title: str, stage: str) -> dict[str, str]:
    return {
        'title': title,
        'value': row.texts[stage],
        'was': row.texts.get('fp32', '') if stage != 'fp32' else '',
        'change': row.changes.get(stage, ''),
        'verdict': row.verdict,
    }


def progress(report: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """Steps of a run, and whether each is done."""
    stage1, stage2 = report.get('stage1', {}), report.get('stage2', {})
    return [
        ('calibration', 'quantizers' in report.get('calibration', {})),
        ('FP32 score', 'seconds' in report.get('fp32', {})),
        ('stage 1', 'bops' in stage1),
        ('stage 2', 'sqnr_db' in stage2 and 'seconds' in stage2),
        ('report', 'feature_error' in stage2 or 'disk_bytes' in stage2),
    ]


def about(report: Mapping[str, Any]) -> dict[str, str]:
    """Facts about a run by their title."""
    gate = report.get('calibration', {}).get('gate')
    stage2 = report.get('stage2', {})
    weights = stage2.get('weights', {})
    facts = {
        'command': report.get('command'),
        'recipe': report['recipe'].get('name'),
        'seed': report.get('seed'),
        'gate': format_start(gate) if gate else None,
        'feature error after both stages': _number(stage2.get('feature_error')),
        'output SQNR of stage 2 (dB)': _number(stage2.get('sqnr_db')),
        'weight SQNR (dB)': f'mean {weights["mean_sqnr_db"]}, worst {weights["min_sqnr_db"]} '
        f'({weights["worst_layer"]})'
        if weights
        else None,
        'packed file': stage2.get('packed_file'),
        'latency': stage2.get('latency_about'),
        'engine': report.get('engine'),
    }
    return {title: str(text) for title, text in facts.items() if text not in (None, '')}


def _number(value: Any) -> str | None:
    return None if value is None else f'{value:.4g}'


def _recipe_text(report: Mapping[str, Any]) -> str:
    """The resolved recipe as YAML with its comments; as stored where this version refuses it."""
    try:
        return recipe_text(as_recipe(report['recipe']))
    except ValueError:
        return json.dumps(report['recipe'], indent=2)


def _outside(report: Mapping[str, Any]) -> str:
    """What lies outside the scope, in words; empty if nothing does."""
    scope = [name for name in report['coverage'].get('scope', ()) if name]
    return ', '.join(scope)


def _curve_charts(run: RunFiles) -> dict[str, Spec]:
    return {
        name: line_chart(points, y='', points=len(points) < 30)
        for name, points in curves(run.scalars).items()
    }


def _scales_chart(report: Mapping[str, Any]) -> Spec | None:
    scales = report.get('stage1', {}).get('scales')
    if not scales:
        return None
    names = [row['name'].removesuffix('_quantizer') for row in scales]
    rows = [{**row, 'name': n} for row, n in zip(scales, short_names(names), strict=True)]
    return moves_chart(rows)


def _depth_charts(report: Mapping[str, Any]) -> dict[str, Spec]:
    ratios, bits = sqnr_rows(report), bits_rows(report)
    found = {}
    if ratios:
        title = 'layer, in model order'
        found['SQNR (dB)'] = line_chart(ratios, title, 'dB', height=220, points=True)
    if bits:
        found['Bits'] = bits_chart(bits)
    return found


def _histograms(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    weights = report.get('stage2', {}).get('weights', {})
    layers = weights.get('layers', {})
    return [
        {
            'name': name,
            'bits': layers[name]['num_bits'],
            'sqnr': layers[name]['weight_sqnr_db'],
            'clipped': 100 * histogram['clipped'],
            'chart': grid_histogram(histogram),
        }
        for name, histogram in weights.get('histograms', {}).items()
    ]
