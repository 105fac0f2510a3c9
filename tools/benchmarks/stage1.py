# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Memory and time of stage-1 training steps against float training, in one run.

    python tools/benchmarks/stage1.py vit_blocks_197x192 swin_t_224 --batch 8
    python tools/benchmarks/stage1.py CONFIG                  # a GPLQ config, on its own images
    python tools/benchmarks/stage1.py --table --out stage1.json

Engines: `float` training, stage 1 with the `reference` fake quantization, with torch's
learnable fake quantize instead (`torchao`), and with packed codes (`fused`); each stage-1 engine
without and with the float teacher. Steps alternate between the engines; the result is the median
of the ratios of neighbouring steps. Rows are added to those of other models in `--out`; a bar chart
is written next to it.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from mmengine.config import DictAction
from mmengine.logging import MMLogger
from stage1_chart import draw, label, table
from stage1_config import workload_of
from stage1_measure import interleaved, peak_memory, saved_bytes
from stage1_models import WORKLOADS, Workload

from gplq_mm.analysis import read_json, write_json
from gplq_mm.ops.engine import TEACHERS

ENGINES = ('float', 'reference', 'torchao', 'fused')
Key = tuple[str, bool]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    names = ', '.join(WORKLOADS)
    parser.add_argument('models', nargs='*', help=f'{names}, or GPLQ configs')
    parser.add_argument('--engines', nargs='+', choices=ENGINES, default=list(ENGINES))
    parser.add_argument('--teacher', nargs='+', choices=('off', 'on'), default=['off', 'on'])
    parser.add_argument('--ffn', choices=('layers', 'recompute'), default='layers')
    parser.add_argument('--teacher-dtype', choices=TEACHERS, default='auto')
    parser.add_argument('--batch', type=int, default=2, help='images a step')
    parser.add_argument('--size', type=int, nargs=2, help='height and width of the images')
    parser.add_argument('--steps', type=int, default=9, help='counted steps; 0: memory only')
    parser.add_argument('--warmup', type=int, default=2, help='steps not counted')
    parser.add_argument('--threads', type=int, help="CPU threads; default: torch's")
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument(
        '--no-peak', action='store_true', help='no separate process per engine for its peak memory'
    )
    parser.add_argument(
        '--no-slope', action='store_true', help='no measurement of the growth with batch and area'
    )
    parser.add_argument(
        '--out', type=Path, help='JSON to add the rows to; the chart is written next to it'
    )
    parser.add_argument('--table', action='store_true', help='print the rows of --out and draw')
    parser.add_argument('--peak-of', help=argparse.SUPPRESS)
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={})
    return parser.parse_args(argv)


def main() -> None:
    """Measure each model, print the table, write JSON and chart."""
    args = parse_args()
    MMLogger.get_instance('mmengine', log_level='WARNING')
    if args.threads:
        torch.set_num_threads(args.threads)
    report = read_json(args.out) if args.out else {}
    for name in args.models:
        workload = find_workload(name, args)
        if args.peak_of:
            print(json.dumps(own_peak(workload, args)))
            return
        rows = measure(workload, name, args)
        report['rows'] = merged(report.get('rows', []), rows)
        if not args.no_slope:
            report.setdefault('slopes', {})[workload.name] = slopes(workload, args)
        if args.out:
            report['torch'] = torch.__version__
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(args.out, report)
        print(table(rows), flush=True)
    if args.table:
        print(table(report['rows']))
    for name, growth in report.get('slopes', {}).items():
        print(f'{name}: ' + '; '.join(f'{k} {slope_text(v)}' for k, v in growth.items()))
    if args.out:
        draw(report['rows'], args.out.with_suffix('.png'))


def find_workload(name: str, args: argparse.Namespace) -> Workload:
    """A built-in model, or that of a config."""
    if name in WORKLOADS:
        return WORKLOADS[name]()
    if not Path(name).is_file():
        raise SystemExit(f'{name} is neither a config nor one of {", ".join(WORKLOADS)}')
    return workload_of(name, args.cfg_options, args.batch)


def combinations(args: argparse.Namespace) -> list[Key]:
    """Engine and teacher of every row; float training comes first and has no teacher."""
    keys = [(e, t == 'on') for t in args.teacher for e in args.engines if e != 'float']
    return [('float', False), *keys]


def build(workload: Workload, key: Key, args: argparse.Namespace) -> Any:
    """The model of a row on its device."""
    options = {'ffn': args.ffn, 'teacher': args.teacher_dtype}
    model = workload.build(*key, options).to(args.device)
    teacher = model.__dict__.get('_teacher')
    if teacher:
        teacher[0].to(args.device)
    return model


def measure(workload: Workload, name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one model."""
    keys = combinations(args)
    models = {key: build(workload, key, args) for key in keys}
    size = args.size or workload.size
    batches = [workload.batch(args.batch, *size) for _ in range(2)]
    saved = {key: saved_bytes(model, batches[0]) for key, model in models.items()}
    seconds = interleaved(models, batches, args.warmup, args.steps) if args.steps else {}
    del models
    peaks = {key: None if args.no_peak else peak_in_process(key, name, args) for key in keys}
    rows = []
    for key in keys:
        wall, cpu = (ratio(seconds, key, clock) for clock in (0, 1))
        rows.append(
            {
                'model': workload.name,
                'engine': key[0],
                'teacher': key[1],
                'device': device_name(args.device),
                'batch': args.batch,
                'threads': torch.get_num_threads(),
                'step_ratio': wall,
                'saved_bytes_per_image': saved[key] / args.batch,
                'saved_ratio': saved[key] / saved['float', False],
                'peak_memory_bytes': peaks[key],
                'step_seconds': statistics.median(s[0] for s in seconds[key]) if seconds else None,
                'cpu_ratio': cpu if args.device == 'cpu' else None,
                'size': list(size),
                'ffn': args.ffn if key[0] == 'fused' else None,
                'teacher_dtype': args.teacher_dtype if key[1] else None,
            }
        )
    return rows


def device_name(device: str) -> str:
    """A GPU with its name."""
    return f'{device} ({torch.cuda.get_device_name(device)})' if device != 'cpu' else device


def ratio(seconds: dict[Key, list[tuple[float, float]]], key: Key, clock: int) -> float | None:
    """Median of the steps' ratios to the neighbouring float steps."""
    if not seconds:
        return None
    pairs = zip(seconds[key], seconds['float', False], strict=True)
    return statistics.median(own[clock] / base[clock] for own, base in pairs)


def slopes(workload: Workload, args: argparse.Namespace) -> dict[str, Any]:
    """Saved bytes by batch size (1, 2, 4 images) and by area (once, twice)."""
    height, width = args.size or workload.size
    cases = [(1, height, width), (2, height, width), (4, height, width), (1, height, 2 * width)]
    found = {}
    for key in combinations(args):
        if not key[1]:
            model = build(workload, key, args)
            found[label({'engine': key[0], 'teacher': False})] = [
                saved_bytes(model, workload.batch(*case)) for case in cases
            ]
    return found


def slope_text(saved: list[int]) -> str:
    """Growth as text: bytes per additional image, and the factor of twice the area."""
    one, two, four, wide = saved
    each = (two - one) / 2**20, (four - two) / 2 / 2**20
    return (
        f'{each[0]:.2f} / {each[1]:.2f} MiB per additional image, twice the area x{wide / one:.2f}'
    )


def peak_in_process(key: Key, name: str, args: argparse.Namespace) -> int:
    """Peak memory of one engine in its own process."""
    which = f'{key[0]}:{"on" if key[1] else "off"}'
    command = [sys.executable, __file__, name, '--peak-of', which, '--device', args.device]
    command += ['--batch', str(args.batch), '--ffn', args.ffn]
    command += ['--teacher-dtype', args.teacher_dtype]
    command += ['--threads', str(torch.get_num_threads())]
    command += ['--size', *map(str, args.size)] if args.size else []
    options = [f'{k}={v}' for k, v in args.cfg_options.items()]
    command += ['--cfg-options', *options] if options else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def own_peak(workload: Workload, args: argparse.Namespace) -> int:
    """Peak memory of the engine that ``--peak-of`` names, in this process."""
    engine, teacher = args.peak_of.split(':')
    model = build(workload, (engine, teacher == 'on'), args)
    return peak_memory(model, workload.batch(args.batch, *(args.size or workload.size)))


def merged(known: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of other models, devices and batches, then the new ones."""

    def group(row: dict[str, Any]) -> tuple:
        return row['model'], row['device'], row['batch'], row['threads']

    replaced = {group(row) for row in new}
    return [row for row in known if group(row) not in replaced] + new


if __name__ == '__main__':
    main()
