# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Bar chart and table of the stage-1 benchmark."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gplq_mm.analysis import format_table

Rows = Sequence[dict[str, Any]]
FIGURES = {
    'saved_ratio': 'bytes saved for backward',
    'step_ratio': 'step time',
}


def label(row: dict[str, Any]) -> str:
    """Engine and teacher of a row."""
    return row['engine'] + (' + teacher' if row['teacher'] else '')


def workload(row: dict[str, Any]) -> str:
    """Model of a row, with its device if that is not a CPU."""
    return row['model'] if row['device'] == 'cpu' else f'{row["model"]}, {row["device"]}'


def table(rows: Rows) -> str:
    """The rows as text."""
    cells = [
        [
            f'{workload(row)} {label(row)}',
            str(row['batch']),
            f'{row["saved_bytes_per_image"] / 2**20:.2f}',
            f'{row["saved_ratio"]:.3f}',
            _figure(row, 'step_seconds', 3),
            _figure(row, 'step_ratio', 3),
            _figure(row, 'cpu_ratio', 3),
            f'{row["peak_memory_bytes"] / 2**20:.0f}' if row['peak_memory_bytes'] else '-',
        ]
        for row in rows
    ]
    titles = ['', 'batch', 'saved MiB per image', 'ratio', 'step (s)', 'ratio', 'of CPU time']
    titles += ['peak MiB']
    return format_table(titles, cells)


def draw(rows: Rows, path: Path) -> None:
    """Write a PNG: one plot per figure with the engines' ratios to float by model."""
    import matplotlib as mpl

    mpl.use('Agg')
    from matplotlib import pyplot

    models = list(dict.fromkeys(map(workload, rows)))
    labels = [name for name in dict.fromkeys(map(label, rows)) if name != 'float']
    known = {(workload(row), label(row)): row for row in rows}
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5), layout='constrained')
    width = 0.8 / max(len(labels), 1)
    for axis, key in zip(axes, ('saved_ratio', 'step_ratio'), strict=True):
        for i, name in enumerate(labels):
            found = [(m, known.get((model, name))) for m, model in enumerate(models)]
            bars = [(m, row[key]) for m, row in found if row and row[key] is not None]
            places = [m + (i - (len(labels) - 1) / 2) * width for m, _ in bars]
            drawn = axis.bar(places, [value for _, value in bars], width, label=name)
            axis.bar_label(drawn, fmt='%.2f', fontsize=7)
        axis.axhline(1.0, color='black', linewidth=0.8)
        names = [model.replace(', ', '\n') for model in models]
        axis.set_xticks(range(len(models)), names, fontsize=8)
        axis.set_xlim(-0.5, len(models) - 0.5)
        axis.set_title(f'{FIGURES[key]}, float training = 1')
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc='outside lower center', ncol=len(labels), fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _figure(row: dict[str, Any], key: str, digits: int) -> str:
    return '-' if row[key] is None else f'{row[key]:.{digits}f}'
