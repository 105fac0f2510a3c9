# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Linear probes of a quantized backbone: nothing of it moves, and it is quantized in every test."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

pytest.importorskip('mmpretrain')

import gplq_mm.integrations.mm.studies.probe_model
from gplq_mm.analysis.linear_probe import ProbeSettings
from gplq_mm.convert import quantizers, set_quantization
from gplq_mm.integrations.mm.checkpoints.checkpoint_io import read_checkpoint
from gplq_mm.integrations.mm.checkpoints.quantized_model import QuantizedSource
from gplq_mm.integrations.mm.checkpoints.run_checkpoint import is_quantized_checkpoint
from gplq_mm.integrations.mm.studies.transfer import (
    TransferResult,
    extract_features,
    probe,
    transfer,
)
from tests.helpers.runners import float_config, gplq_config, make_runner, save_float
from tests.helpers.tiny_projects import TinyProject, make_project
from tests.helpers.tools import load_tool

SHORT = ProbeSettings(epochs=3, batch_size=8)


@pytest.fixture(scope='module')
def project(tmp_path_factory) -> TinyProject:
    return make_project(tmp_path_factory.mktemp('transfer'), 'vit_classifier')


@pytest.fixture(scope='module')
def final(project) -> Path:
    """Final checkpoint of a GPLQ run on the tiny project."""
    work_dir = project.root / 'run'
    checkpoint = save_float(project, project.root / 'float.pth')
    make_runner(gplq_config(project, checkpoint, work_dir)).train()
    return work_dir / 'gplq_final.pth'


@pytest.fixture
def data(project) -> Config:
    init_default_scope('mmpretrain')
    return float_config(project)


def build(final: Path, **options: Any) -> Any:
    init_default_scope('mmpretrain')
    cfg = dict(type='gplq_mm.LinearProbe', checkpoint=str(final), num_classes=2, **options)
    return MODELS.build(cfg)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if not k.startswith('head.')}


def edited(final: Path, path: Path, edit: Any) -> Path:
    checkpoint = read_checkpoint(final)
    edit(checkpoint)
    torch.save(checkpoint, path)
    return path


def test_backbone_of_the_checkpoint_under_a_float_head(final):
    model = build(final)
    saved = read_checkpoint(final)['state_dict']
    assert all(torch.equal(value, saved[key]) for key, value in state(model).items())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        'head.layers.head.weight',
        'head.layers.head.bias',
    }
    assert not quantizers(model.head)
    assert all(q.is_active for q in quantizers(model).values())
    assert {q.kind for q in quantizers(model).values()} == {'activation', 'weight'}


def test_features_are_quantized_in_training_and_test(final):
    model, images = build(final), torch.randn(2, 3, 32, 32)
    model.train()
    in_training = model.extract_feat(images)[-1]
    assert not in_training.requires_grad
    model.eval()
    assert torch.equal(in_training, model.extract_feat(images)[-1])
    set_quantization(model, False)
    assert not torch.equal(in_training, model.extract_feat(images)[-1])


def test_only_stochastic_depth_follows_the_mode(final):
    model = build(final, drop_path_rate=0.5)
    model.train()
    on = {type(m).__name__ for m in model.backbone.modules() if m.training}
    assert on == {'DropPath'}
    assert model.head.training
    images = torch.randn(32, 3, 32, 32)
    assert not torch.equal(model.extract_feat(images)[-1], model.extract_feat(images)[-1])
    model.eval()
    assert not any(m.training for m in model.modules())


def test_training_moves_the_head_alone_and_the_checkpoint_tests_to_the_same(
    final, data, project, tmp_path
):
    data.merge_from_dict(dict(work_dir=str(tmp_path), log_level='WARNING', load_from=None))
    data.model = dict(
        _delete_=True, type='gplq_mm.LinearProbe', checkpoint=str(final), num_classes=2
    )
    data.model.pop('_delete_')
    data.optim_wrapper.optimizer.lr = 0.1
    runner = make_runner(data)
    before, head = state(runner.model), runner.model.head.layers.head.weight.clone()
    runner.train()
    after = state(runner.model)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not torch.equal(head, runner.model.head.layers.head.weight)
    metrics = runner.val()
    data.load_from = str(tmp_path / 'epoch_1.pth')
    tested = make_runner(data)
    assert tested.test() == metrics
    assert all(q.is_active for q in quantizers(tested.model).values())


def test_float_twin_is_the_model_that_the_run_began_with(final, project):
    twin = build(final, quantized=False)
    saved = read_checkpoint(project.root / 'float.pth')['state_dict']
    found = state(twin)
    assert found.keys() == {key for key in saved if not key.startswith('head.')}
    assert all(torch.equal(found[key], saved[key]) for key in found)


def test_both_probes_from_one_checkpoint(final, data):
    result = transfer(data, str(final), seeds=(0, 1), settings=SHORT)
    assert len(result.fp32) == len(result.quantized) == 2
    again = transfer(data, str(final), seeds=(0, 1), settings=SHORT)
    assert again == result
    json.dumps(result.as_dict())
    assert result.table().count('\n') == 4


def test_probe_leaves_the_network_as_it_was(final, data):
    model = QuantizedSource(str(final)).quantized()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    probe(model, data, settings=SHORT)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_features_of_training_images_are_not_augmented(final, data):
    data.train_dataloader.dataset.pipeline = [dict(type='NoSuchTransform')]
    model = QuantizedSource(str(final)).quantized()
    (features, labels), (test, _) = extract_features(model, data)
    assert features.shape == (40, 32)
    assert test.shape == (8, 32)
    assert labels.bincount().tolist() == [20, 20]


def test_a_checkpoint_without_config_needs_the_model(final, data, tmp_path):
    path = edited(final, tmp_path / 'bare.pth', lambda c: c['meta'].pop('cfg'))
    with pytest.raises(ValueError, match=r'give it as model=dict\('):
        QuantizedSource(str(path))
    given = QuantizedSource(str(path), model=data.model).quantized()
    own = QuantizedSource(str(final)).quantized()
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(given(images), own(images))


def test_refusals(final, project, data, tmp_path):
    assert not is_quantized_checkpoint(read_checkpoint(project.root / 'float.pth'))
    with pytest.raises(ValueError, match='it is a float checkpoint; give the gplq_final.pth'):
        build(project.root / 'float.pth')
    with pytest.raises(ValueError, match=r"weights are float, first .* \(stage 'stage1'\)"):
        build(final.with_name('gplq_stage1.pth'))
    with pytest.raises(ValueError, match=r'--cfg-options model.checkpoint='):
        MODELS.build(dict(type='gplq_mm.LinearProbe', num_classes=2))

    def forget(checkpoint: dict) -> None:
        state = checkpoint['state_dict']
        key = next(k for k in state if k.endswith('input_quantizer.calibrated'))
        state[key] = torch.tensor(False)

    with pytest.raises(ValueError, match='1 quantizers of the checkpoint were never calibrated'):
        build(edited(final, tmp_path / 'uncalibrated.pth', forget))

    def move(checkpoint: dict) -> None:
        checkpoint['gplq']['float_checkpoint']['path'] = '/nowhere/float.pth'

    moved = edited(final, tmp_path / 'moved.pth', move)
    with pytest.raises(ValueError, match='does not exist or has changed; give it with fp32'):
        transfer(data, str(moved), settings=SHORT)
    data.pop('train_dataloader')
    with pytest.raises(ValueError, match='a probe needs train_dataloader'):
        transfer(data, str(final), settings=SHORT)


@pytest.fixture
def config(project, final) -> Path:
    path = project.config.with_name('transfer.py')
    path.write_text(
        f"_base_ = './{project.config.name}'\n"
        "model = dict(_delete_=True, type='gplq_mm.LinearProbe', num_classes=2)\n"
    )
    return path


@pytest.mark.parametrize('how', [['--seeds', '0', '1'], ['--train']], ids=['cached', 'train'])
def test_tool_prints_both_and_writes_them(how, config, project, final, monkeypatch, caplog, capsys):
    monkeypatch.chdir(project.root)
    out = project.root / 'transfer.json'
    options = ['--out', str(out), '--epochs', '2', *how]
    load_tool('transfer').main([str(config), str(final), *options])
    written = json.loads(out.read_text())
    assert 'FP32 probe    quantized   difference' in capsys.readouterr().out
    assert written['protocol'].startswith('2 epochs')
    assert len(written['fp32']) == len(written['quantized']) == (1 if '--train' in how else 2)


def test_tool_wants_a_probe_config(project, final, monkeypatch):
    monkeypatch.chdir(project.root)
    with pytest.raises(ValueError, match=r'configs/gplq/\*_transfer.py'):
        load_tool('transfer').main([str(project.config), str(final)])


def test_table_and_difference():
    result = TransferResult([50.0, 60.0], [52.0, 59.0], [0, 1], 'x')
    assert result.difference == 0.5
    assert result.table().splitlines()[-1].split() == ['mean', '55.00', '55.50', '+0.50']


def test_a_probe_is_linear_whatever_the_models_head_was() -> None:
    linear = gplq_mm.integrations.mm.studies.probe_model._linear_head
    stacked = dict(type='StackedLinearClsHead', in_channels=8, num_classes=3, mid_channels=[4])
    assert linear(stacked, 5)['type'] == 'LinearClsHead'
    assert set(linear(stacked, 5)) == {'type', 'in_channels', 'num_classes', 'loss'}
    own = linear(dict(type='VisionTransformerClsHead', in_channels=8, hidden_dim=4), 5)
    assert own['type'] == 'VisionTransformerClsHead' and 'hidden_dim' not in own


def test_a_backbone_without_stochastic_depth_is_probed_without(final, monkeypatch):
    monkeypatch.setattr(gplq_mm.integrations.mm.studies.probe_model, '_takes', lambda *_: False)
    model = build(final, drop_path_rate=0.1)
    assert not any(getattr(m, 'drop_prob', 0) for m in model.modules())
    monkeypatch.undo()
    assert any(getattr(m, 'drop_prob', 0) for m in build(final, drop_path_rate=0.1).modules())


def test_images_of_a_size_that_the_backbone_does_not_take(final, data, monkeypatch):
    network = build(final)
    network.backbone.img_size = (256, 256)
    monkeypatch.setattr(type(network.backbone), 'forward', refuses)
    with pytest.raises(ValueError, match=r'32x32, it was built for \(256, 256\): 7 < 8; write'):
        extract_features(network, data)


def refuses(*_: Any) -> None:
    raise AssertionError('7 < 8')
