# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""A work dir as a run of a detector leaves it, written without a run."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from gplq_mm.convert import resolve_recipe
from gplq_mm.ops import QuantLinear
from gplq_mm.pages.run_files import examples_path

LAYERS = [f'backbone.layers.{i}.{part}' for i in range(3) for part in ('attn.qkv', 'ffn.fc1')]
LONG_NAME = 'neck.' + '.'.join(['a_module_with_a_long_name'] * 6)
LOG = (
    '2026/01/02 03:04:05 - mmengine - INFO - fine\n'
    '2026/01/02 03:04:05 - mmengine - WARNING - "FileClient" will be deprecated in future.\n'
    '2026/01/02 03:04:06 - mmengine - WARNING - <b>the learning rate</b> is shared\n'
    '2026/01/02 03:04:07 - mmengine - WARNING - <b>the learning rate</b> is shared\n'
)


def report_data(**changes: Any) -> dict[str, Any]:
    """Content of a finished report; `changes` replace its entries."""
    histogram = dict(qmin=-8, qmax=7, low=-9.5, high=8.5, counts=[1, 5, 9, 5, 1], clipped=0.01)
    weights = {
        name: dict(num_bits=4, weight_mse=1e-6, weight_sqnr_db=12.0 + i)
        for i, name in enumerate(LAYERS)
    }
    operands = [
        dict(name=name, kind=kind, module=name, role='input', bits=4)
        for name in LAYERS
        for kind in ('weight', 'activation')
    ]
    ap = {'coco/bbox_mAP': 0.5, 'coco/bbox_mAP_l': -1.0, 'coco/cat_precision': 0.4}
    return {
        'recipe': resolve_recipe('w4a4'),
        'coverage': {
            'counts': dict(linear=len(LAYERS), conv=0, matmul=0),
            'kept_float': [dict(name=LONG_NAME, reason='no handler for x.Y')],
            'scope': ['backbone', 'neck'],
            'quantized': dict(linear=LAYERS, conv=[], matmul=[]),
        },
        'operands': operands,
        'versions': {'gplq_mm': '0.1.0'},
        'seed': 7,
        'command': 'python tools/train.py config.py --cfg-options ' + 'x' * 300,
        'calibration': {
            'quantizers': 12,
            'layers': {n: dict(activation_error=0.01, error_after=0.1) for n in LAYERS},
            'gate': dict(images=32, feature_error=0.09, limit=0.5, agreement=0.97, kl=0.03),
        },
        'fp32': dict(metrics=ap, model_bytes=8 * 2**20, bops=8e12, latency_ms=90.0, seconds=9.0),
        'stage1': {
            'metrics': {**ap, 'coco/bbox_mAP': 0.49},
            'bops': 4e12,
            'scales': [
                dict(name=f'{n}.input_quantizer', before=0.5, after=1.0 + i, octaves=1.0 + i)
                for i, n in enumerate(LAYERS)
            ],
        },
        'stage2': {
            'metrics': {**ap, 'coco/bbox_mAP': 0.48, 'coco/cat_precision': 0.1},
            'disk_bytes': 2 * 2**20,
            'latency_ms': 30.0,
            'bops': 1e12,
            'mean_bits': dict(weight=4.1, activation=4.2),
            'feature_error': 0.2,
            'sqnr_db': 11.0,
            'seconds': 3.0,
            'notes': ['a note of stage 2'],
            'weights': {
                'mean_sqnr_db': 14.5,
                'min_sqnr_db': 12.0,
                'worst_layer': LAYERS[0],
                'layers': weights,
                'histograms': dict.fromkeys(LAYERS[:2], histogram),
            },
        },
        **changes,
    }


def jpeg(width: int = 40, height: int = 30) -> str:
    """A grey image as base64."""
    stream = io.BytesIO()
    Image.new('RGB', (width, height), (90, 90, 90)).save(stream, 'JPEG')
    return base64.b64encode(stream.getvalue()).decode('ascii')


def example_data() -> dict[str, Any]:
    """One image with a kept, a lost and a won box."""

    def box(left: float, state: str) -> dict[str, Any]:
        shape = [left, 0.2, left + 0.3, 0.8]
        return {'box': shape, 'score': 0.75, 'class': 'cat', 'state': state}

    entry = {
        'name': 'one.jpg',
        'jpeg': jpeg(),
        'width': 40,
        'height': 30,
        'difference': 1.5,
        'fp32': [box(0.0, 'kept'), box(0.7, 'lost')],
        'quantized': [box(0.0, 'kept'), box(0.4, 'won')],
    }
    return {'compared': 5, 'different': 1, 'examples': [entry]}


def write_work_dir(folder: Path, **changes: Any) -> Path:
    """Write the work dir; returns the path of its JSON report."""
    logs = folder / '20260102_030405'
    (logs / 'vis_data').mkdir(parents=True)
    report = folder / 'gplq_report.json'
    report.write_text(json.dumps(report_data(**changes)))
    lines = [
        {'loss': 2.0 / i, 'loss_cls': 1.0 / i, 'lr': 1e-4 / i, 'iter': i, 'step': i}
        for i in range(1, 6)
    ]
    text = '\n'.join(json.dumps(line) for line in [*lines, {'coco/bbox_mAP': 0.5, 'step': 1}])
    (logs / 'vis_data' / 'scalars.json').write_text(text + '\n{"loss": 1.')
    (logs / '20260102_030405.log').write_text(LOG)
    examples_path(report).write_text(json.dumps(example_data()))
    return report


def quantized_linear(weight: torch.Tensor) -> QuantLinear:
    """A converted linear layer with this weight, `(out_features, in_features)`."""
    from gplq_mm.convert import convert_

    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0]))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    rules = [{'role': 'input', 'activation': {'granularity': 'per_tensor'}}]
    convert_(model, dict(base='w4a4', scope='all', rules=rules))
    layer = model[0]
    assert isinstance(layer, QuantLinear)
    return layer
