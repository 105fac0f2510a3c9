# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Time a stage-1 training step against the float model's, in one process on the same batches.

    python tools/benchmarks/stage1.py CONFIG [--steps 10] [--out stage1.json]

Steps alternate float, stage 1, float, stage 1, ..., so that the ratio, taken pair by pair,
holds while the machine's speed drifts. Stage 1 is timed twice: with and without its teacher.
"""

import argparse
import copy
import statistics
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from torch import nn

from gplq_mm.algorithms.calibration import calibrate_activations
from gplq_mm.engine import GPLQOptimWrapperConstructor
from gplq_mm.engine.calibration_data import CalibrationSet
from gplq_mm.engine.checkpoint import load_float_, quantization_keys
from gplq_mm.engine.teacher import attach_teacher, float_state_of, pca_images
from gplq_mm.evaluation import format_table, write_json
from gplq_mm.utils.checkpoint_io import read_checkpoint
from gplq_mm.utils.config import apply_cfg_options


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('config', help='GPLQ config')
    parser.add_argument('--steps', type=int, default=10, help='counted steps of each engine')
    parser.add_argument('--warmup', type=int, default=2, help='steps not counted')
    parser.add_argument('--out', type=Path, help='JSON to write')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={})
    return parser.parse_args()


def build_engines(cfg: Config) -> dict[tuple[str, bool], nn.Module]:
    """Float model, stage-1 model without and with its teacher, from the same FP32 weights."""
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    checkpoint = read_checkpoint(cfg.load_from)
    calibration = None
    models: dict[tuple[str, bool], nn.Module] = {}
    for teacher in (False, True):
        model_cfg = copy.deepcopy(cfg.model)
        if not teacher:
            model_cfg.recipe = without_mimicking(model_cfg.get('recipe', 'w4a4'))
        model = MODELS.build(model_cfg).to(device)
        load_float_(model, checkpoint)
        state = float_state_of(model, quantization_keys(model))
        calibration = calibration or CalibrationSet(cfg, **model.gplq.recipe['calibration'])
        calibrate_activations(model, calibration.run_pass(model, 'calibration'))
        if teacher:
            images = pca_images(calibration)
            attach_teacher(model, {'path': cfg.load_from, 'sha256': None}, state, images)
        models['reference', teacher] = model
    float_model = MODELS.build(copy.deepcopy(model.gplq.float_cfg)).to(device)
    float_model.load_state_dict(state)
    return {('float', False): float_model, **models}


def without_mimicking(recipe: Any) -> dict[str, Any]:
    """The recipe with the task loss only."""
    return {'base': recipe, 'mimic': None} if isinstance(recipe, str) else {**recipe, 'mimic': None}


def train_step(model: nn.Module, batch: Any, optim_wrapper: Any) -> float:
    """Seconds of one training step."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    model.train_step(copy.deepcopy(batch), optim_wrapper)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Print the table and write the JSON."""
    args = parse_args()
    cfg = Config.fromfile(args.config)
    apply_cfg_options(cfg, args.cfg_options)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    torch.manual_seed(0)
    engines = build_engines(cfg)
    reference = engines['reference', False]
    optimizers = {k: stage1_optimizer(m, reference) for k, m in engines.items()}
    dataloader = Runner.build_dataloader(copy.deepcopy(cfg.train_dataloader), seed=0)
    batches = list(islice(dataloader, min(args.steps, 4)))
    seconds: dict[tuple[str, bool], list[float]] = {key: [] for key in engines}
    for step, batch in enumerate(islice(cycle(batches), args.warmup + args.steps)):
        for key, model in engines.items():
            model.train()
            taken = train_step(model, batch, optimizers[key])
            if step >= args.warmup:
                seconds[key].append(taken)
    rows = [result(key, seconds, batches[0], cfg) for key in engines]
    cells = [
        [
            r['engine'] + (' + teacher' if r['teacher'] else ''),
            f'{r["step_seconds"]:.3f}',
            f'{r["step_ratio"]:.2f}',
        ]
        for r in rows
    ]
    print(format_table(['engine', 'step (s)', 'ratio'], cells))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, {'rows': rows})


def stage1_optimizer(model: nn.Module, reference: nn.Module) -> Any:
    """The recipe's optimizer, for the float model too."""
    if not hasattr(model, 'gplq'):
        model.gplq = reference.gplq
    return GPLQOptimWrapperConstructor({})(model)


def result(
    key: tuple[str, bool],
    seconds: dict[tuple[str, bool], list[float]],
    batch: Any,
    cfg: Config,
) -> dict[str, Any]:
    """One row: median step time, median ratio of the pairs."""
    ratios = [a / b for a, b in zip(seconds[key], seconds['float', False], strict=True)]
    return {
        'model': Path(cfg.filename).stem,
        'engine': key[0],
        'teacher': key[1],
        'device': 'cuda' if torch.cuda.is_available() else 'cpu',
        'batch': len(batch['inputs']),
        'threads': torch.get_num_threads(),
        'step_seconds': statistics.median(seconds[key]),
        'step_ratio': statistics.median(ratios),
    }


if __name__ == '__main__':
    main()
