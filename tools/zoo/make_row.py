# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Turn a finished work dir into a row of the model zoo: an entry of a metafile.yml.

The entry has the form of mmpretrain's metafiles. With --metafile it is added to that file, or
replaces the entry of the same name; without, it is printed. Then write the page anew with
`python tools/zoo/write_models_page.py`.

Example:
    python tools/zoo/make_row.py work_dirs/demo/w4a4 --dataset "Handwritten digits" \
        --config configs/demo/mask_rcnn_vit_digits_w4a4.py --metafile configs/demo/metafile.yml
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from gplq_mm.analysis import REPORT_NAME, read_json
from gplq_mm.analysis.report import bits_label

COLLECTION = 'GPLQ'
METRICS = {
    'accuracy/top1': ('Image Classification', 'Top 1 Accuracy', 1),
    'coco/bbox_mAP': ('Object Detection', 'box AP', 100),
    'coco/segm_mAP': ('Instance Segmentation', 'mask AP', 100),
}
"""Metric of a report -> task and metric of a metafile, and the factor between them."""
FLOAT = 'FP32 '
"""Begin of the name of a float model's metric."""


def make_row(
    report: Mapping[str, Any], config: str, dataset: str, command: str, date: str
) -> dict[str, Any]:
    """The entry of one run.

    Args:
        report: Content of `gplq_report.json`.
        config: Path of the GPLQ config.
        dataset: Name of the data set.
        command: Command that repeats the run.
        date: Day of the run, `YYYY-MM-DD`.

    Raises:
        ValueError: If the run is not finished, or has none of the known metrics.
    """
    found = report.get('stage2', {}).get('metrics', {})
    results = [
        {'Task': task, 'Dataset': dataset, 'Metrics': _both(report, key, metric, factor)}
        for key, (task, metric, factor) in METRICS.items()
        if key in found
    ]
    if not results:
        raise ValueError(
            f'stage 2 has the metrics {sorted(found)}; a row needs one of {sorted(METRICS)} of a '
            'finished run'
        )
    metadata = {
        'Bits': bits_label(report['recipe'], 'stage2'),
        'Recipe': report['recipe']['name'],
        'Scope': report['recipe']['scope'],
        'FP32 Bytes': report['fp32']['model_bytes'],
        'Model Bytes': report['stage2']['model_bytes'],
        'Seed': report['seed'],
        'Date': date,
        'Command': command,
    }
    for key, name in (('disk_bytes', 'Packed File Bytes'), ('latency_about', 'Latency Of')):
        if key in report['stage2']:
            metadata[name] = report['stage2'][key]
    for stage, name in (('fp32', 'FP32 Latency (ms)'), ('stage2', 'Latency (ms)')):
        if 'latency_ms' in report[stage]:
            metadata[name] = round(report[stage]['latency_ms'], 1)
    return {
        'Name': Path(config).stem,
        'In Collection': COLLECTION,
        'Config': config,
        'Metadata': metadata,
        'Results': results,
    }


def _both(report: Mapping[str, Any], key: str, metric: str, factor: int) -> dict[str, float]:
    """The quantized and the float model's value of a metric."""
    stages = {metric: 'stage2', f'{FLOAT}{metric}': 'fp32'}
    values = {name: report[stage]['metrics'].get(key) for name, stage in stages.items()}
    return {name: round(factor * v, 2) for name, v in values.items() if v is not None}


def add_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add an entry to a metafile, in place of one of the same name."""
    content = yaml.safe_load(path.read_text(encoding='utf-8')) if path.is_file() else {}
    models = list(content.get('Models') or [])
    names = [model['Name'] for model in models]
    place = names.index(row['Name']) if row['Name'] in names else len(models)
    models[place : place + 1] = [dict(row)]
    temporary = path.with_name(f'.{path.name}.tmp')
    temporary.write_text(dump({**content, 'Models': models}), encoding='utf-8')
    os.replace(temporary, path)


def dump(content: Any) -> str:
    """YAML with the keys in their order."""
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Turn a finished work dir into a row of the zoo')
    parser.add_argument('work_dir', type=Path, help=f'folder with {REPORT_NAME}')
    parser.add_argument('--config', required=True, help='GPLQ config, as the row shall name it')
    parser.add_argument('--dataset', required=True, help='name of the data set')
    parser.add_argument('--command', help='command of the run; python tools/train.py CONFIG')
    parser.add_argument('--date', help="day of the run; that of the report's last change")
    parser.add_argument('--metafile', type=Path, help='file to add the row to; none: print it')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Print or add the row; return the exit code."""
    args = parse_args(argv)
    path = args.work_dir / REPORT_NAME
    if not path.is_file():
        sys.stderr.write(f'error: no report at {path.absolute()}; give the folder of a GPLQ run\n')
        return 2
    report = read_json(path)
    date = args.date or datetime.date.fromtimestamp(path.stat().st_mtime).isoformat()
    command = args.command or report.get('command') or f'python tools/train.py {args.config}'
    try:
        row = make_row(report, args.config, args.dataset, command, date)
    except ValueError as error:
        sys.stderr.write(f'error: {path}: {error}\n')
        return 2
    if args.metafile:
        add_row(args.metafile, row)
    else:
        sys.stdout.write(dump([row]))
    return 0


if __name__ == '__main__':
    sys.exit(main())
