# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Run GPLQ end to end on handwritten digits, without a download.

Five steps, each a command that can be run alone: create the data, train a tiny ViT Mask R-CNN in
float (kept for later runs), quantize it with GPLQ, print the comparison, draw the predictions.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONVERTER = Path('tools/dataset_converters/digits_to_coco.py')
FLOAT_CONFIG = Path('configs/demo/mask_rcnn_vit_digits.py')
GPLQ_CONFIG = Path('configs/demo/mask_rcnn_vit_digits_w4a4.py')
DATA = Path('data/digits')
NUM_STEPS = 5
STAGES = {'fp32': 'FP32', 'stage1': 'W32A4', 'stage2': 'W4A4'}
ROWS = {
    'box AP': lambda stage: f'{100 * stage["metrics"]["coco/bbox_mAP"]:.1f}',
    'mask AP': lambda stage: f'{100 * stage["metrics"]["coco/segm_mAP"]:.1f}',
    'size (MiB)': lambda stage: f'{stage["model_bytes"] / 2**20:.2f}',
    'on disk (MiB)': lambda stage: (
        f'{stage["disk_bytes"] / 2**20:.2f}' if 'disk_bytes' in stage else '-'
    ),
    'latency (ms)': lambda stage: f'{stage["latency_ms"]:.0f}' if 'latency_ms' in stage else '-',
    'bit operations (G)': lambda stage: f'{stage["bops"] / 1e9:.1f}',
    'time (s)': lambda stage: f'{stage["seconds"]:.0f}',
    'peak memory (MiB)': lambda stage: f'{stage["peak_memory_bytes"] / 2**20:.0f}',
}


def announce(number: int, title: str) -> None:
    """Print the line that opens a step."""
    print(f'\n[{number}/{NUM_STEPS}] {title}', flush=True)


def run(number: int, *command: str | Path) -> None:
    """Run a Python command, its output streaming.

    Raises:
        SystemExit: If the command fails; the message names the step and the command.
    """
    text = shlex.join(['python', *map(str, command)])
    print(f'      $ {text}', flush=True)
    begin = time.monotonic()
    code = subprocess.run([sys.executable, *map(str, command)], check=False).returncode
    if code:
        sys.exit(f'demo: step {number}/{NUM_STEPS} failed with exit code {code}: {text}')
    print(f'      done in {time.monotonic() - begin:.0f} s', flush=True)


def fingerprint() -> str:
    """Return a hash of the float model's resolved config and data."""
    from mmengine.config import Config  # slow import: only after the arguments are checked

    config = Config.fromfile(ROOT / FLOAT_CONFIG).dump()
    return hashlib.sha256((config + (ROOT / CONVERTER).read_text()).encode()).hexdigest()


def finished_float(work_dir: Path) -> Path | None:
    """Return the float checkpoint if an earlier run finished it and nothing has changed."""
    record = work_dir / 'demo.json'
    if not record.exists():
        return None
    content = json.loads(record.read_text())
    checkpoint = Path(content['checkpoint'])
    return checkpoint if content['fingerprint'] == fingerprint() and checkpoint.exists() else None


def train_float(work_dir: Path) -> Path:
    """Train the float model, or reuse the existing one; return its checkpoint."""
    checkpoint = finished_float(work_dir)
    if checkpoint:
        print(f'      already trained: {checkpoint} (--fresh trains again)')
        return checkpoint
    run(2, 'tools/train.py', FLOAT_CONFIG, '--work-dir', work_dir)
    checkpoint = Path((work_dir / 'last_checkpoint').read_text().strip())
    record = {'checkpoint': str(checkpoint), 'fingerprint': fingerprint()}
    (work_dir / 'demo.json').write_text(json.dumps(record))
    return checkpoint


def quantize(work_dir: Path, checkpoint: Path) -> dict:
    """Run both GPLQ stages from a float checkpoint; return the report they write."""
    report = work_dir / 'gplq_report.json'
    report.unlink(missing_ok=True)
    options = ['--cfg-options', f'load_from={checkpoint}']
    run(3, 'tools/train.py', GPLQ_CONFIG, '--work-dir', work_dir, *options)
    if not report.exists():
        sys.exit(f'demo: step 3/{NUM_STEPS} left no {report}')
    return json.loads(report.read_text())


def comparison(report: dict) -> str:
    """Return the table of the three models, one row per quantity."""
    from gplq_mm.analysis.report import format_table

    rows = [[name, *(show(report[stage]) for stage in STAGES)] for name, show in ROWS.items()]
    return format_table(['', *STAGES.values()], rows)


def draw(out: Path, float_checkpoint: Path, gplq_dir: Path) -> None:
    """Draw the predictions of the three models on the first validation images."""
    models = {
        'FP32': (FLOAT_CONFIG, float_checkpoint),
        'W32A4': (GPLQ_CONFIG, gplq_dir / 'gplq_stage1.pth'),
        'W4A4': (GPLQ_CONFIG, gplq_dir / 'gplq_final.pth'),
    }
    arguments = [part for name, files in models.items() for part in ('--model', name, *files)]
    images = [DATA / 'val' / f'{index:06d}.jpg' for index in range(3)]
    run(5, 'tools/demo_picture.py', *images, *arguments, '--out', out)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description='GPLQ on handwritten digits, end to end')
    parser.add_argument(
        '--work-dir',
        type=Path,
        default=Path('work_dirs/demo'),
        help='folder of all results, relative to the repository root',
    )
    parser.add_argument('--fresh', action='store_true', help='train the float model again')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the five steps."""
    args = parse_args(argv)
    os.chdir(ROOT)
    # a second thread is 20 % faster on idle cores and several times slower on shared ones
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    begin = time.monotonic()
    float_dir, gplq_dir = args.work_dir / 'float', args.work_dir / 'w4a4'
    if args.fresh:
        for folder in (float_dir, gplq_dir):
            shutil.rmtree(folder, ignore_errors=True)
    announce(1, f'Handwritten digits in COCO format, in {DATA}')
    run(1, CONVERTER, '--out', DATA)
    announce(2, 'Float training of a tiny ViT Mask R-CNN from scratch: a few minutes')
    checkpoint = train_float(float_dir)
    announce(3, 'GPLQ: calibration, stage 1 (activations), stage 2 (weights)')
    report = quantize(gplq_dir, checkpoint)
    announce(4, f'Accuracy, size and time (from {gplq_dir}/gplq_report.json)')
    print(comparison(report))
    announce(5, 'Predictions side by side')
    picture = args.work_dir / 'predictions.png'
    draw(picture, checkpoint, gplq_dir)
    print(f'\nPicture: {picture}. Whole demo: {(time.monotonic() - begin) / 60:.1f} min.')


if __name__ == '__main__':
    main()
