# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Write docs/which_preset.md; its figures are means of the rows of docs/benchmarks/accuracy.json.

Example:
    python tools/dev/write_preset_page.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ROWS = ROOT / 'docs' / 'benchmarks' / 'accuracy.json'
TARGET = ROOT / 'docs' / 'which_preset.md'
PRETRAINED = 'dinov2_s14_flowers17'
SMALL = 'vit_cifar10'
MODELS = {
    PRETRAINED: 'DINOv2 ViT-S/14, Flowers-17',
    SMALL: 'ViT 6 x 128, CIFAR-10',
    'swin_cifar10': 'Swin 2-2 x 48, CIFAR-10',
}
RECIPES = {
    'ours': 'presets `wXaY`',
    'ours_v1': 'earlier presets `wXaY_v1`',
    'paper': 'presets `gplq_wXaY_paper`',
    'rtn': 'no training, round to nearest',
}
"""Recipes of the table, one epoch on all training images, and what a reader knows them by."""
PAGE = """\
# Which preset?

Written by `tools/dev/write_preset_page.py` from the stored measurements
(`docs/benchmarks/accuracy.json`); a test compares them.

**Take `w4a4`.** It is the default of `init`. Change it for one of these reasons:

1. **Can you train for one epoch?**
    * No, I have a few hundred images and minutes: `gplq_mm.quantize`, `calibrate` and
      `quantize_weights` without `train_stage1` ([any torch
      model](tutorials/any_torch_model.md)). Expect to lose more below 8 bits: on the small ViT
      rounding to nearest without training loses {rtn44} points at W4A4.
    * Yes: go on.
2. **What may be lost?**
    * Nothing at all, and 8 bits are small enough: `w8a8` (no stored rows).
    * About a point: `w4a4`. Measured: {pre44} points on a pretrained ViT, {small44} on a small one
      (below 0: the quantized model is better).
    * I do not know whether my model stands 4 bits: `auto`. It starts as `w4a4`; roles of operands
      with a large error get 6 or 8 bits before training, and the report says what they cost.
3. **Is the file size what counts, not the speed?**
    * Yes: `w2a4` almost halves the file once more, at {pre24} points on the pretrained ViT. Try
      [mixed bits](tutorials/mixed_precision.md) with a mean of 3 first.
    * Activations lose accuracy, weights do not (the final table tells: stage 1 is low): `w4a8`.
4. **Are 3 bits needed?** `w3a3`: {pre33} points on the pretrained ViT, {small33} on the small one.
   The file is smaller; the speed is that of 4 bits, since the engine multiplies 8-bit integers.
5. **Do you want to repeat the paper?** `gplq_w4a4_paper`, `gplq_w3a3_paper`: its learning rate is
   made for ten thousand steps. In one epoch of 390 steps it loses {paper44} points on the small
   ViT where `w4a4` loses {small44}.

`w2a2` is for studies. After a run: [accuracy dropped](when_accuracy_drops.md) says what to change
next, by what the table shows.

## The figures

Top-1 in percent, one epoch of stage 1 on all training images, mean over seeds; *loss* is FP32 minus
stage 2.

{table}

```bash
python tools/benchmarks/accuracy.py --table   # all stored rows, with deviations, time and memory
```

Detectors: Mask R-CNN on nuclei loses nothing at W4A4 ([accuracy](accuracy.md)). Accuracy on COCO
and ImageNet is not measured here ([limits](limits.md)).
"""


def chosen(rows: Sequence[Mapping[str, Any]], model: str, recipe: str, bits: str) -> list[Any]:
    """Rows of a model, recipe and bits over all images, one per seed."""
    wanted = (model, recipe, bits, 'accuracy/top1')
    return [r for r in rows if (r['model'], r['recipe'], r['bits'], r['metric']) == wanted]


def loss(rows: Sequence[Mapping[str, Any]], model: str, recipe: str, bits: str) -> str:
    """Mean loss of accuracy in points.

    Raises:
        ValueError: If no row is stored.
    """
    own = chosen(rows, model, recipe, bits)
    if not own:
        raise ValueError(f'{ROWS} has no row of {model}, {recipe}, {bits}')
    return f'{statistics.mean(r["fp32"] - r["stage2"] for r in own):.1f}'


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Means over seeds by model, recipe and bits."""
    lines = ['| model | recipe | bits | seeds | FP32 | stage 1 | stage 2 | loss |']
    lines.append('| --- | --- | --- | --- | --- | --- | --- | --- |')
    for model, about in MODELS.items():
        for recipe, name in RECIPES.items():
            every = {r['bits'] for r in rows}
            for bits in sorted(every, reverse=True):
                own = chosen(rows, model, recipe, bits)
                if own:
                    stages = ('fp32', 'stage1', 'stage2')
                    means = [f'{statistics.mean(r[s] for r in own):.2f}' for s in stages]
                    cells = [about, name, bits.upper(), str(len(own)), *means]
                    lines.append(f'| {" | ".join(cells)} | {loss(rows, model, recipe, bits)} |')
    return '\n'.join(lines)


def render() -> str:
    """The whole page."""
    rows = json.loads(ROWS.read_text(encoding='utf-8'))
    return PAGE.format(
        rtn44=loss(rows, SMALL, 'rtn', 'w4a4'),
        paper44=loss(rows, SMALL, 'paper', 'w4a4'),
        small44=loss(rows, SMALL, 'ours', 'w4a4'),
        small33=loss(rows, SMALL, 'ours', 'w3a3'),
        pre44=loss(rows, PRETRAINED, 'ours', 'w4a4'),
        pre33=loss(rows, PRETRAINED, 'ours', 'w3a3'),
        pre24=loss(rows, PRETRAINED, 'ours', 'w2a4'),
        table=table(rows),
    )


if __name__ == '__main__':
    TARGET.write_text(render(), encoding='utf-8')
