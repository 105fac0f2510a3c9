# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The rows that `accuracy.py` stores, and their table."""

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gplq_mm.analysis import format_table

KEYS = ('model', 'dataset', 'recipe', 'bits', 'seed')
TITLES = ['recipe', 'bits', 'seeds', 'FP32', 'stage 1', 'stage 2', 'drop', 'on', 's', 'peak MiB']
CPU = 'cpu'


def row_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Identity of a row."""
    return tuple(row[key] for key in KEYS)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Stored rows; empty if there is no file."""
    return json.loads(path.read_text()) if path.is_file() else []


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows, one per line, to a temporary file and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.tmp')
    lines = ',\n'.join(json.dumps(row) for row in sorted(rows, key=row_key))
    temporary.write_text(f'[\n{lines}\n]\n')
    os.replace(temporary, path)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Mean over seeds (with standard deviation), one table per model and data set."""
    parts = []
    for model, dataset in dict.fromkeys((r['model'], r['dataset']) for r in rows):
        own = [r for r in rows if (r['model'], r['dataset']) == (model, dataset)]
        groups = dict.fromkeys((r['bits'], r['recipe']) for r in own)
        cells = [
            _line([r for r in own if (r['bits'], r['recipe']) == group])
            for group in sorted(groups, key=lambda g: (_descending(g[0]), g[1]))
        ]
        parts.append(f'{model}, {dataset}\n{format_table(TITLES, cells)}')
    return '\n\n'.join(parts) or 'no rows'


def _line(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    drops = [r['fp32'] - r['stage2'] for r in rows]
    devices = sorted({r.get('device', CPU) for r in rows})
    cost = ['-', '-']  # seconds and bytes of different devices have no mean
    if len(devices) == 1:
        memory = max(r['peak_memory_bytes'] for r in rows) / 2**20
        cost = [f'{statistics.mean(r["seconds"] for r in rows):.0f}', f'{memory:.0f}']
    return [
        rows[0]['recipe'],
        rows[0]['bits'].upper(),
        str(len(rows)),
        *(_mean([r[key] for r in rows]) for key in ('fp32', 'stage1', 'stage2')),
        _mean(drops),
        ', '.join(devices),
        *cost,
    ]


def _mean(values: Sequence[float]) -> str:
    text = f'{statistics.mean(values):.2f}'
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f'{text} ± {spread:.2f}' if spread else text


def _descending(bits: str) -> tuple[int, ...]:
    return tuple(-int(digit) for digit in bits if digit.isdigit())
