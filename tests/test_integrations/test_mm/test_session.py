# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The steps of a run, with MMEngine's EMA hook beside them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from gplq_mm.convert import quantizers
from gplq_mm.integrations.mm import session as session_module
from gplq_mm.integrations.mm.run import weight_stage
from gplq_mm.integrations.mm.run.run_report import RunReport
from gplq_mm.integrations.mm.session import GPLQSession, recall_source, remember_source
from gplq_mm.recipe import as_recipe
from tests.helpers.gplq_runs import assert_same_weights, report, weights
from tests.helpers.runners import RECIPE, gplq_config, make_runner
from tests.helpers.tiny_projects import TinyProject

MOMENTUM = 0.25
EMA = dict(type='EMAHook', momentum=MOMENTUM)


class Collect(Hook):
    """An average of its own, by the formula."""

    priority = 'VERY_LOW'

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}
        self.calibrated: dict[str, Tensor] = {}

    def before_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        if not self.calibrated:
            self.calibrated = {k: v.clone() for k, v in runner.model.state_dict().items()}

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        for name, parameter in runner.model.named_parameters():
            now = parameter.detach().double().clone()
            if name in self.average:
                now = (1 - MOMENTUM) * self.average[name] + MOMENTUM * now
            self.average[name] = now


class Averaged:
    """A finished run with EMA, and what was watched in it."""

    def __init__(self, project: TinyProject, fp32: Path) -> None:
        self.project, self.work_dir, self.seen = project, project.root / 'ema', Collect()
        runner = make_runner(gplq_config(project, fp32, self.work_dir, hooks=(EMA,)))
        runner.register_hook(self.seen)
        runner.train()
        self.runner = runner


@pytest.fixture(scope='module')
def averaged(project: TinyProject, fp32: Path) -> Averaged:
    return Averaged(project, fp32)


def test_stage_1_ends_with_the_averaged_weights_and_scales(averaged: Averaged) -> None:
    stage1 = weights(averaged.work_dir / 'gplq_stage1.pth')
    moved = 0
    for name, average in averaged.seen.average.items():
        assert torch.allclose(stage1[name].double(), average, rtol=1e-5, atol=1e-7), name
        moved += not torch.equal(stage1[name], averaged.seen.calibrated[name])
    assert moved > 20
    assert any(n.endswith('_quantizer.scale') for n in averaged.seen.average)


def test_calibration_reaches_the_average_that_was_copied_before_it(averaged: Averaged) -> None:
    stage1 = weights(averaged.work_dir / 'gplq_stage1.pth')
    final = weights(averaged.work_dir / 'gplq_final.pth')
    names = list(quantizers(averaged.runner.model, 'activation'))
    assert names
    for name in names:
        assert bool(stage1[f'{name}.calibrated'])
        for key in ('zero_point', 'quant_range'):
            expected = averaged.seen.calibrated[f'{name}.{key}']
            assert torch.equal(stage1[f'{name}.{key}'], expected)
            assert torch.equal(final[f'{name}.{key}'], expected)
        assert torch.equal(final[f'{name}.scale'], stage1[f'{name}.scale'])


def test_stage_2_quantizes_the_averaged_weights(averaged: Averaged, tmp_path: Path) -> None:
    path = averaged.work_dir / 'gplq_stage1.pth'
    runner = make_runner(gplq_config(averaged.project, path, tmp_path))
    runner.load_checkpoint(str(path))
    metrics = weight_stage.run(runner).data['stage2']['metrics']
    assert_same_weights(tmp_path / 'gplq_final.pth', averaged.work_dir / 'gplq_final.pth')
    assert metrics == report(averaged.work_dir)['stage2']['metrics']


def test_stage_1_metrics_are_those_of_the_averaged_weights(
    averaged: Averaged, tmp_path: Path
) -> None:
    path = averaged.work_dir / 'gplq_stage1.pth'
    runner = make_runner(gplq_config(averaged.project, path, tmp_path, hooks=(EMA,)))
    assert runner.test() == report(averaged.work_dir)['stage1']['metrics']


def test_resumed_after_calibration_the_averaged_run_is_the_same(
    averaged: Averaged, tmp_path: Path
) -> None:
    start = averaged.work_dir / 'gplq_calibrated.pth'
    cfg = gplq_config(averaged.project, start, tmp_path, hooks=(EMA,), resume=True)
    make_runner(cfg).train()
    assert_same_weights(tmp_path / 'gplq_final.pth', averaged.work_dir / 'gplq_final.pth')
    assert 'calibration' not in report(tmp_path)


class Stub(GPLQSession):
    """A session in its last step, whose training ended after 12 iterations."""

    def __init__(self, work_dir: Path) -> None:
        loop = SimpleNamespace(dataloader=SimpleNamespace(dataset=None))
        self.runner: Any = SimpleNamespace(iter=12, val_loop=loop, work_dir=str(work_dir))
        self.model: Any = torch.nn.Linear(1, 1)
        self.model.gplq = SimpleNamespace(recipe=as_recipe('w4a4'))
        self.report = RunReport(str(work_dir), resume=True)
        self.calibration: Any = [None]


@pytest.mark.parametrize(
    ('iterations', 'expected'), [(6, 0.9), (12, 0.1)], ids=['earlier epoch', 'last epoch']
)
def test_metrics_of_an_earlier_epoch_are_not_taken_for_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, iterations: int, expected: float
) -> None:
    session = Stub(tmp_path)
    session.report.update('stage1', metrics={'acc': 0.1}, iterations=iterations)
    state = {'state_dict': session.model.state_dict()}
    monkeypatch.setattr(session_module, 'snapshot', lambda *a, **k: dict(state))
    monkeypatch.setattr(session_module, 'record', lambda *a: {})
    monkeypatch.setattr(session_module, 'evaluate', lambda *a: {'acc': 0.9})
    monkeypatch.setattr(session_module, 'apply_stage2', lambda *a: None)
    monkeypatch.setattr(RunReport, 'count_macs', lambda *a: None)
    monkeypatch.setattr(RunReport, 'log_table', lambda self: None)
    session.finish({})
    assert report(tmp_path)['stage1'] == {'metrics': {'acc': expected}, 'iterations': 12}


def test_without_validation_a_run_still_ends_with_a_checkpoint(
    project: TinyProject, fp32: Path, tmp_path: Path
) -> None:
    none: dict[str, Any] = dict(val_dataloader=None, val_cfg=None, val_evaluator=None)
    recipe = {**RECIPE, 'mimic': None}
    cfg = gplq_config(project, fp32, tmp_path, recipe, train_cfg=dict(max_epochs=1))
    cfg.update(none)
    make_runner(cfg).train()
    content = report(tmp_path)
    assert [content[s]['metrics'] for s in ('fp32', 'stage1', 'stage2')] == [{}, {}, {}]
    assert (tmp_path / 'gplq_final.pth').exists()


def test_the_source_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert recall_source(str(tmp_path)) == {}
    (tmp_path / 'a.pth').write_bytes(b'weights')
    monkeypatch.chdir(tmp_path)
    source = remember_source(str(tmp_path), 'a.pth')
    assert source['path'] == str(tmp_path / 'a.pth')
    assert recall_source(str(tmp_path)) == source
    url = 'https://nowhere.invalid/a.pth'
    assert remember_source(str(tmp_path), url) == {'path': url, 'sha256': None}
