# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""One finished run inside the test process, for the tests that look at what it leaves."""

from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip('mmpretrain')

from mmengine.runner import Runner

from tests.helpers.runners import gplq_config, make_runner, save_float
from tests.helpers.tiny_projects import TinyProject, make_project


@dataclass(frozen=True)
class FinishedRun:
    """A tiny classifier after stage 2.

    Attributes:
        project: Data and float config.
        checkpoint: FP32 checkpoint.
        work_dir: What the run wrote.
        runner: Its runner; do not train it further.
    """

    project: TinyProject
    checkpoint: Path
    work_dir: Path
    runner: Runner


@pytest.fixture(scope='session')
def project(tmp_path_factory: pytest.TempPathFactory) -> TinyProject:
    """The classification project."""
    return make_project(tmp_path_factory.mktemp('classifier'), 'vit_classifier')


@pytest.fixture(scope='session')
def fp32(project: TinyProject) -> Path:
    """A float checkpoint with random weights."""
    return save_float(project, project.root / 'fp32.pth')


@pytest.fixture(scope='session')
def finished(project: TinyProject, fp32: Path) -> FinishedRun:
    """An uninterrupted run of one epoch with `save_best`."""
    work_dir = project.root / 'finished'
    save_best = {'default_hooks.checkpoint.save_best': 'auto'}
    runner = make_runner(gplq_config(project, fp32, work_dir, **save_best))
    runner.train()
    return FinishedRun(project, fp32, work_dir, runner)
