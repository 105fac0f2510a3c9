# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Scores outside the loops equal those of the loops, and no hook hears of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmengine.runner import Runner

from gplq_mm.integrations.mm.run.evaluate import evaluate, numbers_of
from tests.helpers.runners import float_config, make_runner
from tests.helpers.tiny_projects import TinyProject


@pytest.fixture
def runner(project: TinyProject, fp32: Path, tmp_path: Path) -> Runner:
    """A float runner, weights loaded."""
    cfg = float_config(project)
    cfg.merge_from_dict(dict(work_dir=str(tmp_path), log_level='WARNING'))
    runner = make_runner(cfg)
    runner.load_checkpoint(str(fp32))
    return runner


def test_it_gives_the_loops_metrics_without_calling_hooks(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = runner.val()
    called: list[str] = []
    monkeypatch.setattr(runner, 'call_hook', lambda name, **_: called.append(name))
    runner.model.train()
    found = evaluate(runner, runner.val_loop, 'FP32')
    assert found == expected
    assert set(found) == {'accuracy/top1'}
    assert not called
    assert runner.model.training


def test_only_numbers_are_kept(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {'a': 1, 'name': 'x', 'list': [1], 'none': None, 'nan': float('inf')}
    monkeypatch.setattr(runner.val_loop.evaluator, 'evaluate', lambda size: given)
    assert evaluate(runner, runner.val_loop, 'x') == {'a': 1.0, 'nan': float('inf')}


def test_numbers_of_numpy_are_numbers() -> None:
    assert numbers_of({'mIoU': np.float32(0.5), 'table': 'x'}) == {'mIoU': 0.5}
