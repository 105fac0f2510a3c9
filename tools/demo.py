# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Run GPLQ end to end on handwritten digits, without a download.

Six phases of four commands, each of which can be run alone: create the data, train a tiny ViT Mask
R-CNN in float (kept for later runs), quantize it with GPLQ, draw the predictions. Their output goes
to a log file.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from demo_progress import Demo, Part, Phase, as_time

ROOT = Path(__file__).resolve().parents[1]
CONVERTER = Path('tools/dataset_converters/digits_to_coco.py')
FLOAT_CONFIG = Path('configs/demo/mask_rcnn_vit_digits.py')
GPLQ_CONFIG = Path('configs/demo/mask_rcnn_vit_digits_w4a4.py')
DATA = Path('data/digits')
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
FILES = {
    'gplq_stage1.pth': 'float weights, quantized activations',
    'gplq_final.pth': 'quantized weights as floats',
    'gplq_packed.pth': 'the same model as integer codes: what is deployed',
    'gplq_report.html': 'the report, for a browser',
}

DATA_PHASE = 'handwritten digits in COCO format'
FLOAT_PHASE = 'float training of a ViT Mask R-CNN'
_STEPS = r'(?P<done>\d+)/(?P<total>\d+)'
QUANTIZATION = (
    Phase(
        'calibration, score of FP32',
        (Part(f'calibration by layer: {_STEPS} ', 0.6), Part(f'FP32: evaluated {_STEPS}', 0.3)),
    ),
    Phase(
        'stage 1, activations',
        (
            Part(rf'Epoch\(train\) +\[1\]\[ *{_STEPS}\]', 0.9),
            Part(rf'Epoch\(val\) +\[1\]\[ *{_STEPS}\]', 0.1),
        ),
        begins='Checkpoints will be saved to',
    ),
    Phase(
        'stage 2, weights; score and latency',
        (Part(f'stage 2: {_STEPS} ', 0.4), Part(f'stage 2: evaluated {_STEPS}', 0.3)),
        begins=r'stage 2: \d+ images',
    ),
)
PICTURE_PHASE = 'predictions side by side'
NUM_PHASES = 3 + len(QUANTIZATION)


def num_processes() -> int:
    """How many processes train: on a CPU one per core, if they share a batch evenly; else one.

    A second thread of one process makes these small layers only 20 % faster, a second process with
    half of each batch nearly twice as fast.
    """
    from mmengine.device import get_device  # slow import: only after the arguments are checked

    if get_device() != 'cpu':
        return 1
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    )
    return max(number for number in (1, 2, 4) if number <= cores)


def train_command(config: Path, work_dir: Path, *options: str) -> list[str | Path]:
    """Compose a training command; its processes share each batch of the config.

    Args:
        config: Config file.
        work_dir: Folder of its results.
        options: More of ``--cfg-options``.
    """
    from mmengine.config import Config

    processes = num_processes()
    words: list[str | Path] = ['tools/train.py', config, '--work-dir', work_dir]
    options = (*options, 'default_hooks.logger.interval=10')
    if processes > 1:
        size = Config.fromfile(config).train_dataloader.batch_size // processes
        launch = ['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={processes}']
        words = [*launch, *words, '--launcher', 'pytorch']
        options = (*options, f'train_dataloader.batch_size={size}')
    return [*words, '--cfg-options', *options]


def fingerprint() -> str:
    """Return a hash of the float model's resolved config and data."""
    from mmengine.config import Config

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


def train_float(demo: Demo, work_dir: Path) -> Path:
    """Train the float model, or reuse the existing one; return its checkpoint."""
    from mmengine.config import Config

    checkpoint = finished_float(work_dir)
    if checkpoint:
        demo.skip(FLOAT_PHASE, f'already trained: {checkpoint} (--fresh trains again)')
        return checkpoint
    epochs = Config.fromfile(FLOAT_CONFIG).train_cfg.max_epochs
    pattern = rf'Epoch\(train\) +\[(?P<epoch>\d+)\]\[ *{_STEPS}\]'
    # its score is the first column of the quantization's report
    command = train_command(FLOAT_CONFIG, work_dir, f'train_cfg.val_begin={epochs + 1}')
    demo.run(command, [Phase(FLOAT_PHASE, (Part(pattern, 1.0, epochs),))])
    checkpoint = Path((work_dir / 'last_checkpoint').read_text().strip())
    record = {'checkpoint': str(checkpoint), 'fingerprint': fingerprint()}
    (work_dir / 'demo.json').write_text(json.dumps(record))
    return checkpoint


def quantize(demo: Demo, work_dir: Path, checkpoint: Path) -> dict:
    """Run both GPLQ stages from a float checkpoint; return the report they write."""
    report = work_dir / 'gplq_report.json'
    report.unlink(missing_ok=True)
    demo.run(train_command(GPLQ_CONFIG, work_dir, f'load_from={checkpoint}'), QUANTIZATION)
    if not report.exists():
        sys.exit(f'demo: the quantization left no {report}; its output: {demo.log}')
    return json.loads(report.read_text())


def comparison(report: dict) -> str:
    """Return the table of the three models, one row per quantity."""
    from gplq_mm.analysis.report import format_table

    rows = [[name, *(show(report[stage]) for stage in STAGES)] for name, show in ROWS.items()]
    return format_table(['', *STAGES.values()], rows)


def files(work_dir: Path) -> str:
    """Return the files of a quantization with their size on disk."""
    found = [(work_dir / name, text) for name, text in FILES.items() if (work_dir / name).exists()]
    return '\n'.join(f'{path.stat().st_size:>12,} bytes  {path}: {text}' for path, text in found)


def draw(demo: Demo, out: Path, float_checkpoint: Path, gplq_dir: Path) -> None:
    """Draw the predictions of the three models on the first validation images."""
    models = {
        'FP32': (FLOAT_CONFIG, float_checkpoint),
        'W32A4': (GPLQ_CONFIG, gplq_dir / 'gplq_stage1.pth'),
        'W4A4': (GPLQ_CONFIG, gplq_dir / 'gplq_final.pth'),
    }
    arguments = [part for name, files in models.items() for part in ('--model', name, *files)]
    images = [DATA / 'val' / f'{index:06d}.jpg' for index in range(3)]
    command = ['tools/demo_picture.py', *images, *arguments, '--out', out]
    demo.run(command, [Phase(PICTURE_PHASE)])


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
    """Run all phases, print the comparison."""
    args = parse_args(argv)
    os.chdir(ROOT)
    os.environ.setdefault('OMP_NUM_THREADS', '1')  # the processes share the cores already
    begin = time.monotonic()
    float_dir, gplq_dir = args.work_dir / 'float', args.work_dir / 'w4a4'
    if args.fresh:
        for folder in (float_dir, gplq_dir):
            shutil.rmtree(folder, ignore_errors=True)
    demo = Demo(NUM_PHASES, args.work_dir / 'demo.log')
    print(f'GPLQ on handwritten digits, {num_processes()} process(es); details: {demo.log}\n')
    demo.run([CONVERTER, '--out', DATA], [Phase(DATA_PHASE)])
    checkpoint = train_float(demo, float_dir)
    report = quantize(demo, gplq_dir, checkpoint)
    picture = args.work_dir / 'predictions.png'
    draw(demo, picture, checkpoint, gplq_dir)
    print(f'\n{comparison(report)}')
    print(f'Latency: {report["stage2"].get("latency_about", "not measured")}.')
    print(f'\n{files(gplq_dir)}\n{picture.stat().st_size:>12,} bytes  {picture}: predictions')
    print(f'\nWhole demo: {as_time(time.monotonic() - begin)}.')


if __name__ == '__main__':
    main()
