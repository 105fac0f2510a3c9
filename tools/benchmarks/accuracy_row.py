# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""One row of `accuracy.py`, in its own process: `python accuracy_row.py JOB.json`.

The job is a dict; `work_dir` gets the GPLQ config that `python -m gplq_mm init` writes, the
run's checkpoints and report, and `result.json`.
"""

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy_table import CPU
from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS, DefaultScope
from mmengine.runner import Runner

from gplq_mm.analysis import REPORT_NAME, read_json, write_json
from gplq_mm.cli import init
from gplq_mm.cli.gplq_config import is_iteration_based
from gplq_mm.compat.mmengine import start_from
from gplq_mm.convert import quantizers
from gplq_mm.integrations.mm.checkpoints.checkpoint_io import read_checkpoint, write_checkpoint
from gplq_mm.integrations.mm.checkpoints.run_checkpoint import STAGE1_NAME, unwrap
from gplq_mm.integrations.mm.launch.config import apply_cfg_options
from gplq_mm.integrations.mm.launch.errors import ConfigError
from gplq_mm.integrations.mm.launch.tools import build_runner, read_config, run_tool
from gplq_mm.integrations.mm.run import weight_stage

RESULT_NAME = 'result.json'


def row_config(job: dict[str, Any]) -> Config:
    """The config of a row: that of `init`, with the row's recipe, data, seed and schedule.

    Raises:
        ConfigError: If the float config counts iterations.
    """
    out = Path(job['work_dir'], 'config.py')
    init.run(
        Namespace(
            config=job['config'],
            checkpoint=job['checkpoint'],
            recipe=job['preset'],
            out=out,
            force=True,
        )
    )
    options = {'data_root': job['data_root']} if job['data_root'] else {}
    cfg = read_config(
        Namespace(
            config=str(out),
            work_dir=job['work_dir'],
            cfg_options=options,
            launcher='none',
            local_rank=0,
        )
    )
    if is_iteration_based(cfg):
        raise ConfigError(f'{job["config"]} counts iterations; give one that counts epochs')
    cfg.model.recipe = job['recipe']
    cfg.randomness = dict(seed=job['seed'])
    _set_hooks(cfg, job['evaluate_fp32'])
    if job['train_fraction'] < 1:
        keep_fraction(cfg, job['train_fraction'], job['seed'])
    set_schedule(cfg, job['schedule'], job['epochs'])
    apply_cfg_options(cfg, job['options'])
    return cfg


def _hook(evaluate_fp32: bool) -> dict[str, Any]:
    return dict(type='gplq_mm.GPLQHook', evaluate_fp32=evaluate_fp32, evaluate_calibrated=True)


def _set_hooks(cfg: Config, evaluate_fp32: bool) -> None:
    others = [h for h in cfg.get('custom_hooks', []) if h['type'] != 'gplq_mm.GPLQHook']
    cfg.custom_hooks = [*others, _hook(evaluate_fp32)]
    hooks = cfg.setdefault('default_hooks', ConfigDict())
    # a killed row starts again: only stage 1's checkpoint is stored
    hooks['checkpoint'] = ConfigDict(type='CheckpointHook', interval=-1, save_last=False)
    hooks['logger'] = ConfigDict(type='LoggerHook', interval=50)


def keep_fraction(cfg: Config, fraction: float, seed: int) -> None:
    """Train and calibrate on a seeded subset of the training images.

    Raises:
        ConfigError: If the training set is a concatenation.
    """
    innermost = cfg.train_dataloader.dataset
    while 'dataset' in innermost:
        innermost = innermost['dataset']
    if 'datasets' in innermost:
        raise ConfigError('--train-fraction cannot cut a concatenation of data sets')
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        total = len(DATASETS.build(innermost))
    order = np.random.default_rng(seed).permutation(total)
    innermost['indices'] = sorted(int(i) for i in order[: max(1, round(fraction * total))])


def set_schedule(cfg: Config, schedule: str, epochs: int) -> None:
    """Set epochs, with the cosine schedule that `init` writes or a constant learning rate."""
    cfg.train_cfg = ConfigDict(
        type='EpochBasedTrainLoop', max_epochs=epochs, val_interval=max(epochs, 1)
    )
    if schedule == 'constant' or epochs == 0:
        cfg.param_scheduler = []


def run_stage2_alone(runner: Runner, stage1: Path) -> None:
    """Stage 2 from the stage 1 of a row that differs only in the weights' settings."""
    own = Path(runner.work_dir, STAGE1_NAME)
    write_checkpoint(for_other_weights(read_checkpoint(stage1), unwrap(runner.model)), own)
    start_from(runner, str(own), resume=False)
    runner.call_hook('before_run')
    runner.load_checkpoint(str(own))
    weight_stage.run(runner)
    runner.call_hook('after_run')


def for_other_weights(checkpoint: dict[str, Any], model: Any) -> dict[str, Any]:
    """A stage-1 checkpoint converted to `model`'s recipe.

    Weight quantizers and compensation, which stage 2 fills, are as in a new model.

    Args:
        checkpoint: Checkpoint of a stage 1 with float weights.
        model: Converted model of the other recipe.
    """
    later = {f'{name}.' for name in quantizers(model, 'weight')}
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    for key in state.keys() & checkpoint['state_dict'].keys():
        if not key.startswith(tuple(later)) and '.compensation.' not in key:
            state[key] = checkpoint['state_dict'][key]
    gplq = {**checkpoint['gplq'], 'recipe': model.gplq.recipe.as_dict()}
    return {**checkpoint, 'state_dict': state, 'gplq': gplq}


def result_of(job: dict[str, Any]) -> dict[str, Any]:
    """Scores in percent, seconds without scoring, and peak memory of a finished row."""
    report = read_json(Path(job['work_dir'], REPORT_NAME))
    metric = job['metric'] or next(iter(report['stage2']['metrics']))
    before = {} if job['stage1_dir'] is None else read_json(Path(job['stage1_dir'], RESULT_NAME))
    stage1, last = report.get('stage1', {}), report['stage2']
    parts = {
        'calibration_seconds': report.get('calibration', {}).get('seconds', 0.0),
        'stage1_seconds': stage1.get('seconds', 0.0),
        'stage1_memory_bytes': stage1.get('peak_memory_bytes', 0),
        'calibrated': _percent(report.get('calibration', {}).get('metrics', {}), metric),
    }
    if before:
        parts = {key: before.get(key) for key in parts}
    seconds = parts['calibration_seconds'] + parts['stage1_seconds'] + last['seconds']
    return {
        'fp32': _percent(report.get('fp32', {}).get('metrics', {}), metric),
        'stage1': before['stage1'] if before else _percent(stage1['metrics'], metric),
        'stage2': _percent(last['metrics'], metric),
        'seconds': round(seconds, 1),
        'peak_memory_bytes': max(parts['stage1_memory_bytes'], last['peak_memory_bytes']),
        'metric': metric,
        'device': device_name(),
        **parts,
        'stage2_seconds': last['seconds'],
        'feature_error': last.get('feature_error'),
        'stage1_key': job['stage1_key'],
        'fingerprint': job['fingerprint'],
    }


def device_name() -> str:
    """Device of a row: the GPU's name, or `cpu`."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else CPU


def _percent(metrics: dict[str, float], metric: str) -> float | None:
    if metric not in metrics:
        return None
    return round(metrics[metric] * (100 if 'mAP' in metric else 1), 3)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    Path(job['result']).unlink(missing_ok=True)
    runner = build_runner(row_config(job))
    if job['stage1_dir'] is None:
        runner.train()  # the hook calibrates, stage 2 follows, the report is written
    else:
        run_stage2_alone(runner, Path(job['stage1_dir'], STAGE1_NAME))
    write_json(Path(job['result']), result_of(job))


if __name__ == '__main__':
    sys.exit(run_tool(main))
