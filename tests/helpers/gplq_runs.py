# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Run GPLQ on tiny projects with this repository's tools, and compare what they leave."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from .tiny_projects import REPOSITORY, TinyProject, our_tool, run_ok

GPLQ_CONFIG = """
_base_ = '{base}'
load_from = '{checkpoint}'
model = dict(type='gplq_mm.GPLQ', float_type='{float_type}', recipe={recipe})
custom_hooks = [dict(type='gplq_mm.GPLQHook')]
train_cfg = dict(max_epochs={epochs}, val_interval={epochs})
optim_wrapper = dict(_delete_=True, constructor='gplq_mm.GPLQOptimWrapperConstructor')
param_scheduler = []
randomness = dict(seed=3)
"""


def write_gplq_config(
    project: TinyProject,
    checkpoint: Path,
    name: str = 'gplq',
    recipe: str = "dict(base='w4a4', calibration=dict(num_images=4))",
    epochs: int = 1,
) -> Path:
    """A GPLQ config beside the project's float config."""
    path = project.config.with_name(f'{name}.py')
    path.write_text(
        GPLQ_CONFIG.format(
            base=f'./{project.config.name}',
            checkpoint=checkpoint,
            float_type=project.float_type,
            recipe=recipe,
            epochs=epochs,
        )
    )
    return path


def train(
    project: TinyProject, config: Path, work_dir: str, *options: object, gpu: bool = False
) -> Path:
    """Run tools/train.py; return the work dir."""
    command = (our_tool('train'), config, '--work-dir', work_dir, *options)
    run_ok(*command, cwd=project.root, gpu=gpu)
    return project.root / work_dir


def train_until(project: TinyProject, config: Path, work_dir: str, appears: str) -> None:
    """Start tools/train.py and kill -9 the whole process group once a file appears."""
    environment = dict(os.environ, PYTHONPATH=str(REPOSITORY), OMP_NUM_THREADS='1')
    command = [sys.executable, str(our_tool('train')), str(config), '--work-dir', work_dir]
    log = project.root / f'{work_dir}.log'
    with log.open('w') as stream:
        process = subprocess.Popen(
            command,
            cwd=project.root,
            env=environment,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
        target, deadline = project.root / work_dir / appears, time.monotonic() + 240
        while not target.exists():
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, f'{appears} never appeared'
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def report(work_dir: Path) -> dict[str, Any]:
    """The run's JSON report."""
    return json.loads((work_dir / 'gplq_report.json').read_text())


def weights(path: Path) -> dict[str, torch.Tensor]:
    """State dict of one of our own checkpoints, read with the protection on."""
    return torch.load(path, map_location='cpu', weights_only=True)['state_dict']


def assert_same_weights(first: Path, second: Path) -> None:
    """Bit-equal state dicts."""
    one, two = weights(first), weights(second)
    assert set(one) == set(two)
    different = [k for k in one if not torch.equal(one[k], two[k])]
    assert not different, different[:5]
