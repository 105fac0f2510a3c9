# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Two processes on the CPU find what one finds."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip('mmdet')

from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from gplq_mm.integrations.mm.launch import cpu_launch
from gplq_mm.integrations.mm.launch.cpu_launch import prepare_cpu_launch
from tests.helpers.gplq_runs import report, weights, write_gplq_config
from tests.helpers.tiny_projects import TinyProject, make_project, our_tool, run_ok
from tests.helpers.tools import load_tool

TORCHRUN = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2')


@pytest.fixture(scope='module')
def project(tmp_path_factory: pytest.TempPathFactory) -> TinyProject:
    return make_project(tmp_path_factory.mktemp('two'), 'mask_rcnn_swin')


@pytest.fixture(scope='module')
def config(project: TinyProject) -> Path:
    cfg = Config.fromfile(project.config)
    with DefaultScope.overwrite_default_scope('mmdet'):
        torch.manual_seed(0)
        model = MODELS.build(cfg.model)
    path = project.root / 'fp32.pth'
    torch.save({'state_dict': model.state_dict()}, path)
    return write_gplq_config(project, path)


@pytest.fixture(scope='module')
def two(project: TinyProject, config: Path) -> Path:
    """Work dir of a run of one epoch on two processes."""
    train = our_tool('train')
    command = (*TORCHRUN, train, config, '--launcher', 'pytorch', '--work-dir', 'two')
    run_ok(*command, cwd=project.root)
    return project.root / 'two'


def in_process(monkeypatch: pytest.MonkeyPatch, cwd: Path, tool: str, *options: object) -> None:
    monkeypatch.chdir(cwd)
    load_tool(tool).main([str(option) for option in options])


def test_two_processes_calibrate_to_the_same_bits(
    project: TinyProject, config: Path, two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch, project.root, 'train', config, '--work-dir', 'one')
    ours, theirs = (weights(d / 'gplq_calibrated.pth') for d in (project.root / 'one', two))
    assert set(ours) == set(theirs)
    assert [k for k in ours if not torch.equal(ours[k], theirs[k])] == []
    assert sum('_quantizer.scale' in k for k in ours) > 20
    alone, both = report(project.root / 'one'), report(two)
    assert alone['fp32']['metrics'] == both['fp32']['metrics']
    assert alone['calibration']['gate'] == both['calibration']['gate']


def test_two_processes_train_and_finish_once(two: Path) -> None:
    content = report(two)
    assert content['stage1']['iterations'] == 9
    assert set(content['stage1']['metrics']) == set(content['stage2']['metrics'])
    before, after = weights(two / 'gplq_calibrated.pth'), weights(two / 'gplq_stage1.pth')
    moved = [k for k in before if k.endswith('scale') and not torch.equal(before[k], after[k])]
    assert len(moved) > 20
    assert not list(two.glob('.*tmp'))


def scores(folder: Path) -> dict[str, float]:
    """What the test's logger wrote."""
    found = [json.loads(path.read_text()) for path in folder.rglob('*.json')]
    return {k: v for s in found for k, v in s.items() if k.startswith('coco/')}


def values(predictions: Any) -> list[Any]:
    """Predictions in image order, tensors as lists."""
    ordered = sorted(predictions, key=lambda p: p['img_id'])
    keys = ('bboxes', 'scores', 'labels')
    return [{k: p['pred_instances'][k].tolist() for k in keys} for p in ordered]


def test_two_processes_score_as_one(
    project: TinyProject, config: Path, two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final, both = two / 'gplq_final.pth', ('--work-dir', 'test2', '--out', 'two.pkl')
    command = (*TORCHRUN, our_tool('test'), config, final, '--launcher', 'pytorch', *both)
    run_ok(*command, cwd=project.root)
    alone = ('--work-dir', 'test1', '--out', 'one.pkl')
    in_process(monkeypatch, project.root, 'test', config, final, *alone)
    one, other = (pickle.loads((project.root / f).read_bytes()) for f in ('one.pkl', 'two.pkl'))
    assert len(one) == 4
    assert values(one) == values(other)
    assert any(p['scores'] for p in values(one))
    assert scores(project.root / 'test1') == scores(project.root / 'test2')
    assert scores(project.root / 'test1') == report(two)['stage2']['metrics']


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Backends of the process groups that would have been made."""
    backends: list[str] = []
    monkeypatch.setattr(cpu_launch.dist, 'init_process_group', backends.append)
    return backends


@pytest.mark.parametrize(
    ('launcher', 'device'), [('none', 'cpu'), ('slurm', 'cpu'), ('pytorch', 'cuda')]
)
def test_other_launches_are_left_to_mmengine(
    started: list[str], monkeypatch: pytest.MonkeyPatch, launcher: str, device: str
) -> None:
    monkeypatch.setattr(cpu_launch, 'get_device', lambda: device)
    cfg = Config(dict(launcher=launcher))
    prepare_cpu_launch(cfg)
    assert not started
    assert 'model_wrapper_cfg' not in cfg


def test_a_cpu_launch_asks_for_no_device(
    started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_launch, 'get_device', lambda: 'cpu')
    cfg = Config(dict(launcher='pytorch', find_unused_parameters=True))
    prepare_cpu_launch(cfg)
    assert started == ['gloo']
    assert cfg.model_wrapper_cfg.find_unused_parameters
    assert not cfg.model_wrapper_cfg.broadcast_buffers
    assert cfg.model_wrapper_cfg.device_ids is None
    own = Config(dict(launcher='pytorch', model_wrapper_cfg=dict(type='Mine')))
    prepare_cpu_launch(own)
    assert own.model_wrapper_cfg == dict(type='Mine')
