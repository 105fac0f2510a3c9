# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Rows, table and bar chart of the inference benchmark."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from inference_backends import BACKENDS, OURS
from inference_group import Measured

from gplq_mm.analysis import format_table

Rows = Sequence[dict[str, Any]]
EAGER = 'torch'
WARNING = 'do not deploy this here'
NOT_RUN = 'not available'


def rows_of(
    about: dict[str, Any], measured: dict[str, Measured], threads: int, isa: str
) -> list[dict[str, Any]]:
    """Rows of one model and number of threads, one for each backend and batch size.

    ``ratio_fp32`` is the latency of FP32 in eager torch divided by the row's,
    ``ratio_best_float`` that of the fastest float baseline of the same run.

    Args:
        about: `case.json`.
        measured: Results by backend.
        threads: Threads of each process.
        isa: Instruction sets of the processor.
    """
    rows = []
    for batch in about['batches']:
        latency = {name: found.median(batch) for name, found in measured.items()}
        baselines = {
            name: value for name, value in latency.items() if value and BACKENDS[name].is_float
        }
        best = min(baselines, key=lambda name: baselines[name], default=None)
        for name, found in measured.items():
            backend, own = BACKENDS[name], latency[name]
            fastest = baselines[best] if best else None
            p95 = found.p95(batch)
            rows.append(
                {
                    'model': about['name'],
                    'size': about['size'],
                    'backend': name,
                    'bits': about.get('bits') if backend.bits == OURS else backend.bits,
                    'scope': scope_of(about, name),
                    'batch': batch,
                    'threads': threads,
                    'isa': isa,
                    'latency_ms': None if own is None else own * 1e3,
                    'ratio_fp32': _ratio(latency.get(EAGER), own),
                    'peak_memory_bytes': found.peaks.get(batch),
                    'file_bytes': found.file_bytes.get(batch),
                    'metric': found.metric,
                    'value': found.value,
                    'equals_simulation': found.equal,
                    'equal_images': found.equal_images,
                    'latency_p95_ms': None if p95 is None else p95 * 1e3,
                    'calls': len(found.seconds.get(batch, ())),
                    'weights': about['weights'],
                    'best_float': best,
                    'ratio_best_float': _ratio(fastest, own),
                    'advice': advice(backend.is_float, fastest, own),
                    'reason': found.reason,
                }
            )
    return rows


def scope_of(about: dict[str, Any], name: str) -> str:
    """What a row quantizes and what it deploys."""
    backend = BACKENDS[name]
    scope = 'float' if backend.is_float else about.get('scope', 'all')
    if backend.bits == 'w8a8':
        scope = 'all'
    if backend.runs != 'torch' and about['task'] == 'detector':
        return f'{scope}; backbone and neck deployed, heads in torch'
    return str(scope)


def advice(is_float: bool, best_float: float | None, own: float | None) -> str:
    """A warning where a quantized model is slower than the fastest float one.

    Examples:
        >>> advice(False, 0.1, 0.2), advice(False, 0.1, 0.05), advice(True, 0.1, 0.2)
        ('do not deploy this here', '', '')
    """
    slower = own is not None and best_float is not None and own > best_float
    return WARNING if slower and not is_float else ''


def table(rows: Rows) -> str:
    """The rows as text; a row that did not run says why."""
    titles = ['', 'bits', 'threads', 'ms', 'p95', 'x FP32', 'x best float', 'MiB', 'file MiB']
    titles += ['score', 'equal', '']
    cells = [
        [
            f'{row["model"]}, batch {row["batch"]}, {row["backend"]}',
            str(row['bits'] or '-'),
            str(row['threads']),
            _figure(row['latency_ms'], 1),
            _figure(row['latency_p95_ms'], 1),
            _figure(row['ratio_fp32'], 2),
            _figure(row['ratio_best_float'], 2),
            _figure(row['peak_memory_bytes'], 0, 2**20),
            _figure(row['file_bytes'], 1, 2**20),
            _figure(row['value'], 4),
            {True: 'yes', False: 'no', None: '-'}[row['equals_simulation']],
            remark(row),
        ]
        for row in rows
    ]
    return format_table(titles, cells)


def remark(row: dict[str, Any]) -> str:
    """Why a row did not run, or its warning."""
    if row['latency_ms'] is None:
        return f'{NOT_RUN}: {row["reason"]}'
    return row['advice'] or row['reason']


def footnote(rows: Rows) -> str:
    """Best float baseline of each model, batch size and number of threads."""
    lines = {
        (row['model'], row['batch'], row['threads']): (
            f'{row["model"]}, batch {row["batch"]}, {row["threads"]} thread(s): best float '
            f'{row["best_float"]}, weights {row["weights"]}, {row["isa"]}'
        )
        for row in rows
    }
    return '\n'.join(lines.values())


def merged(known: Rows, new: Rows) -> list[dict[str, Any]]:
    """Rows of other models, batch sizes, threads and processors, then the new ones."""

    def group(row: dict[str, Any]) -> tuple[Any, ...]:
        return row['model'], row['batch'], row['threads'], row['isa']

    replaced = {group(row) for row in new}
    return [row for row in known if group(row) not in replaced] + list(new)


def draw(rows: Rows, path: Path) -> None:
    """Write a PNG: speed against FP32 in eager torch, one group of bars per model."""
    import matplotlib as mpl

    mpl.use('Agg')
    from matplotlib import pyplot

    def place(row: dict[str, Any]) -> str:
        return f'{row["model"]}\nbatch {row["batch"]}, {row["threads"]} thr.'

    shown = [row for row in rows if row['ratio_fp32'] is not None]
    places = list(dict.fromkeys(map(place, shown)))
    names = [name for name in BACKENDS if any(row['backend'] == name for row in shown)]
    figure, axis = pyplot.subplots(figsize=(max(8, 2.2 * len(places)), 5), layout='constrained')
    width = 0.85 / max(len(names), 1)
    for i, name in enumerate(names):
        bars = [
            (places.index(place(row)), row['ratio_fp32']) for row in shown if row['backend'] == name
        ]
        at = [spot + (i - (len(names) - 1) / 2) * width for spot, _ in bars]
        drawn = axis.bar(at, [value for _, value in bars], width, label=name)
        axis.bar_label(drawn, fmt='%.2f', fontsize=6, rotation=90, padding=2)
    axis.axhline(1.0, color='black', linewidth=0.8)
    axis.set_xticks(range(len(places)), places, fontsize=8)
    axis.set_title('speed, FP32 in eager torch = 1 (higher is faster)')
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncol=4, fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _ratio(reference: float | None, own: float | None) -> float | None:
    return reference / own if reference and own else None


def _figure(value: float | None, digits: int, unit: float = 1.0) -> str:
    return '-' if value is None else f'{value / unit:.{digits}f}'
