# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""A run that is told to stop leaves what it needs to go on, and goes on with the same bits."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from gplq_mm.integrations.mm.launch.errors import TERMINATED, run_tool
from tests.helpers.gplq_runs import assert_same_weights, report
from tests.helpers.runners import gplq_config, make_runner
from tests.test_integrations.test_mm.conftest import FinishedRun


def loop() -> dict[str, Any]:
    """A loop that resumes in the middle of an epoch; MMEngine takes the first key away."""
    return dict(_delete_=True, type='gplq_mm.ResumableEpochLoop', max_epochs=1, val_interval=1)


class StopAfter(Hook):
    """SIGTERM in an iteration."""

    priority = 'NORMAL'

    def __init__(self, iterations: int) -> None:
        self.iterations = iterations

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        if runner.iter + 1 == self.iterations:
            signal.raise_signal(signal.SIGTERM)


def test_a_stopped_run_goes_on_with_the_same_bits(
    finished: FinishedRun, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    process = subprocess.Popen([sys.executable, '-c', ''])
    process.wait()
    (tmp_path / f'.gplq_final.pth.{process.pid}.tmp').touch()
    cfg = gplq_config(finished.project, finished.checkpoint, tmp_path, train_cfg=loop())
    runner = make_runner(cfg)
    runner.register_hook(StopAfter(3))
    former = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert run_tool(runner.train, '--resume') == TERMINATED
    assert former == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    assert 'stopped by SIGTERM; go on with: python ' in capfd.readouterr().err
    path = tmp_path / 'iter_3.pth'
    assert (tmp_path / 'last_checkpoint').read_text() == str(path)
    assert not list(tmp_path.glob('.*.tmp'))
    stored = torch.load(path, weights_only=True)
    assert stored['meta']['iter'] == 3
    cfg = gplq_config(finished.project, path, tmp_path, train_cfg=loop(), resume=True)
    make_runner(cfg).train()
    assert_same_weights(tmp_path / 'gplq_final.pth', finished.work_dir / 'gplq_final.pth')
    seconds = report(tmp_path)['stage1']['seconds']
    assert 0 < stored['gplq']['stage1_seconds'] < seconds
    assert 'unfinished_seconds' not in report(tmp_path)
