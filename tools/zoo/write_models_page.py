# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Write docs/models.md from the metafiles, and the rows of accuracy.json into theirs.

Example:
    python tools/zoo/write_models_page.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from make_row import COLLECTION, FLOAT, add_row

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / 'docs' / 'models.md'
INDEX = ROOT / 'model-index.yml'
MEASURED = ROOT / 'configs' / 'measured' / 'metafile.yml'
ACCURACY = ROOT / 'docs' / 'benchmarks' / 'accuracy.json'
RECIPE = 'ours'
"""Recipe of accuracy.json that stands for the preset of a row's bits."""
TOP1 = 'Top 1 Accuracy'
SETS = {'cifar10': 'CIFAR-10', 'flowers17': 'Flowers-17'}
COMMAND = 'python tools/benchmarks/accuracy.py --recipes ours'
OF_MODEL = {'dinov2_s14_flowers17': '--models dinov2_s14_flowers17.py --data-root flowers17/'}
"""Arguments of the command that a model needs."""
HEADER = """\
# Models

Written by `tools/zoo/write_models_page.py` from `model-index.yml` and the metafiles below
`configs`, in mmpretrain's form; a test compares them. The package ships configs, no weights.

## Measured

FP32 and quantized model scored in one run on the same images. Accuracy is top-1 in percent, AP of
COCO times 100. *File* is the packed file, or `model_bytes` of the report where none was written.
"""
CONFIGS = """\
## Configs

Every config of `configs/gplq`, ready to run ([how](how_to/public_models.md)); FP32 is the float
model's published figure. The quantized models of these configs are not measured here. A path
`checkpoints/...` is written by a script of `tools/model_converters`, or is yours to give. Configs
of linear probes (`*_transfer.py`): [fine-grained data](how_to/fine_grained.md).
"""
ADD = """\
## Add a row

```shell
python tools/zoo/make_row.py work_dirs/X --config configs/gplq/X.py --dataset COCO \\
    --metafile configs/gplq/metafile.yml
python tools/zoo/write_models_page.py
```
"""


def measured_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Entries of the presets' rows of accuracy.json: means over seeds.

    Args:
        rows: Content of the file.
    """
    own = [r for r in rows if r['recipe'] == RECIPE and r['metric'] == 'accuracy/top1']
    groups = dict.fromkeys((r['model'], r['dataset'], r['bits']) for r in own)
    entries = []
    for model, dataset, bits in groups:
        seeds = [r for r in own if (r['model'], r['dataset'], r['bits']) == (model, dataset, bits)]
        quantized, full = (
            round(statistics.mean(r[stage] for r in seeds), 2) for stage in ('stage2', 'fp32')
        )
        numbers = ' '.join(str(r['seed']) for r in seeds)
        command = [COMMAND, f'--bits {bits} --seeds {numbers}', OF_MODEL.get(model, '')]
        metrics = {TOP1: quantized, f'{FLOAT}{TOP1}': full}
        result = {'Task': 'Image Classification', 'Dataset': SETS[dataset], 'Metrics': metrics}
        metadata = {
            'Bits': bits.upper(),
            'Recipe': bits,
            'Scope': 'all',
            'Seeds': len(seeds),
            'Seconds': round(statistics.mean(r['seconds'] for r in seeds)),
            'Command': ' '.join(command).strip(),
        }
        entries.append(
            {
                'Name': f'{model}_{bits}',
                'In Collection': COLLECTION,
                'Metadata': metadata,
                'Results': [result],
            }
        )
    return entries


def read_models(path: Path) -> list[dict[str, Any]]:
    """Entries of a metafile."""
    return list(yaml.safe_load(path.read_text(encoding='utf-8'))['Models'])


def update_measured(path: Path = MEASURED) -> None:
    """Write the rows of accuracy.json into the metafile; what else an entry has is kept."""
    known = {model['Name']: model for model in read_models(path)}
    for row in measured_rows(json.loads(ACCURACY.read_text(encoding='utf-8'))):
        old = known.get(row['Name'], {})
        row['Metadata'] = {**old.get('Metadata', {}), **row['Metadata']}
        add_row(path, row)


def render() -> str:
    """The whole page."""
    index = yaml.safe_load(INDEX.read_text(encoding='utf-8'))['Import']
    models = [model for name in index for model in read_models(ROOT / name)]
    measured = [m for m in [*models, *read_models(MEASURED)] if is_measured(m)]
    parts = [HEADER, measured_table(measured), CONFIGS, configs_table(models), ADD]
    return '\n'.join(parts)


def is_measured(model: Mapping[str, Any]) -> bool:
    """Whether an entry has a metric of the quantized model."""
    return any(not name.startswith(FLOAT) for name in _metrics(model))


def measured_table(models: Sequence[Mapping[str, Any]]) -> str:
    """One row per model: metrics, size, latency, command."""
    titles = ['model', 'data', 'bits', 'metric', 'FP32', 'quantized', 'file (MiB)', 'command']
    rows = []
    for model in sorted(models, key=lambda m: m['Name']):
        metrics, about = _metrics(model), model['Metadata']
        names = [name for name in metrics if not name.startswith(FLOAT)]
        size = about.get('Packed File Bytes', about.get('Model Bytes'))
        rows.append(
            [
                _name(model),
                model['Results'][0]['Dataset'],
                about['Bits'] + (f', {about["Seeds"]} seeds' if about.get('Seeds', 1) > 1 else ''),
                ' / '.join(names),
                ' / '.join(f'{metrics[FLOAT + name]:g}' for name in names),
                ' / '.join(f'{metrics[name]:g}' for name in names),
                f'{size / 2**20:.2f}' if size else '-',
                f'`{about["Command"]}`',
            ]
        )
    return _table(titles, rows)


def configs_table(models: Sequence[Mapping[str, Any]]) -> str:
    """One row per config: recipe, data, the float model's metric and checkpoint."""
    rows = []
    for model in models:
        metrics, about = _metrics(model), model['Metadata']
        full = [v for name, v in metrics.items() if name.startswith(FLOAT)]
        checkpoint = about.get('FP32 Checkpoint', 'yours')
        if not is_measured(model):
            where = 'OpenMMLab zoo' if 'openmmlab.com' in checkpoint else f'`{checkpoint}`'
            score = ' / '.join(f'{value:g}' for value in full) or '-'
            rows.append([_name(model), about['Recipe'], about['Training Data'], score, where])
    return _table(['config', 'recipe', 'data', 'FP32', 'FP32 checkpoint'], rows)


def _metrics(model: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for result in model.get('Results', ()) for k, v in result['Metrics'].items()}


def _name(model: Mapping[str, Any]) -> str:
    return f'`{model["Name"]}`'


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ['---'] * len(titles), *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines) + '\n'


if __name__ == '__main__':
    update_measured()
    PAGE.write_text(render(), encoding='utf-8')
