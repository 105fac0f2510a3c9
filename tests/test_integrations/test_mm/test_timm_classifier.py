# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""A run of mmpretrain's `TimmClassifier`, whose state dict leaves out the prefix `model.`."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip('mmpretrain')
pytest.importorskip('timm')

from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_checkpoint

from gplq_mm.analysis.start_error import quantization_keys
from gplq_mm.convert import quantizers
from gplq_mm.integrations.mm.checkpoints.run_checkpoint import check_quantized, load_float_
from gplq_mm.integrations.mm.deployment import engine_choice
from gplq_mm.integrations.mm.deployment.engine_choice import use_file_
from gplq_mm.integrations.mm.deployment.example_pass import image_size
from tests.helpers.gplq_runs import report, weights
from tests.helpers.runners import gplq_config, make_runner, save_float
from tests.helpers.tiny_projects import make_project

PTQ = ['gptq', dict(type='finetune', num_images=40)]
RECIPE = dict(
    base='w4a4',
    calibration=dict(num_images=4),
    stage2=dict(num_images=8),
    weight=dict(ptq=PTQ),
)
MIMIC = ('loss_mimic_logits', 'loss_mimic_feature')


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run: its runner; `work_dir` has what it wrote."""
    project = make_project(tmp_path_factory.mktemp('timm'), 'timm_classifier')
    fp32 = save_float(project, project.root / 'fp32.pth')
    cfg = gplq_config(project, fp32, project.root / 'run', RECIPE)
    runner = make_runner(cfg)
    runner.train()
    return runner


def build(runner: Any) -> Any:
    """The run's model before any weights are loaded."""
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return MODELS.build(copy.deepcopy(runner.cfg.model)).eval()


def test_stage_1_mimics_logits_and_features_and_stage_2_quantizes_all(run: Any) -> None:
    work_dir = Path(run.work_dir)
    content, final = report(work_dir), weights(work_dir / 'gplq_final.pth')
    first = run.message_hub.get_scalar('train/loss_mimic_feature').data[0]
    for name in MIMIC:
        assert (run.message_hub.get_scalar(f'train/{name}').data[0] > 0).all(), name
    assert len(first) == 10
    assert content['calibration']['gate']['passed']
    assert content['stage2']['feature_error'] < 0.3
    assert content['coverage']['counts'] == {'linear': 9, 'conv': 1, 'matmul': 4}
    calibrated = [bool(v) for k, v in final.items() if k.endswith('.calibrated')]
    assert len(calibrated) == 28 and all(calibrated)


def test_keys_are_those_of_the_float_model_with_the_quantizers(run: Any) -> None:
    fp32 = torch.load(run.cfg.load_from, weights_only=True)['state_dict']
    final = weights(Path(run.work_dir) / 'gplq_final.pth')
    assert set(final) - set(fp32) == quantization_keys(run.model)
    assert set(fp32) <= set(final) and 'blocks.0.attn.qkv.weight' in fp32
    assert 'blocks.0.attn.qkv.input_quantizer.scale' in final


@pytest.mark.parametrize('file', ['gplq_final.pth', 'gplq_packed.pth'])
def test_every_file_gives_the_runs_model(run: Any, file: str) -> None:
    model, path = build(run), Path(run.work_dir) / file
    load_checkpoint(model, str(path), map_location='cpu', strict=True)
    stock = build(run)
    stock.load_state_dict(torch.load(path, weights_only=True)['state_dict'])
    x = torch.rand(2, 3, *image_size(model))
    assert image_size(model) == (32, 32)
    with torch.no_grad():
        expected = run.model.eval()(x)
        assert torch.equal(model(x), expected) and torch.equal(stock(x), expected)


def test_a_checkpoint_that_does_not_fit_is_refused(run: Any) -> None:
    checkpoint = torch.load(run.cfg.load_from, weights_only=True)
    state = checkpoint['state_dict']
    load_float_(build(run), {'state_dict': dict(state)})
    bias = state.pop('norm.bias')
    with pytest.raises(ValueError, match='missing keys: model.norm.bias'):
        load_float_(build(run), {'state_dict': dict(state)})
    with pytest.raises(ValueError, match='NaN or infinity in: model.norm.bias'):
        load_float_(build(run), {'state_dict': {**state, 'norm.bias': bias * float('nan')}})
    final = torch.load(Path(run.work_dir) / 'gplq_final.pth', weights_only=True)
    check_quantized(build(run), final)
    name = next(k for k in final['state_dict'] if k.endswith('attn.qkv.input_quantizer.calibrated'))
    final['state_dict'][name] = torch.tensor(False)
    with pytest.raises(ValueError, match='1 quantizers of the checkpoint were never calibrated'):
        check_quantized(build(run), final)


def test_the_features_of_the_loss_are_those_of_timm(run: Any) -> None:
    model, x = build(run), torch.rand(2, 3, 32, 32)
    for quantizer in quantizers(model).values():
        quantizer.enabled = False
    with torch.no_grad():
        assert torch.equal(model.model.forward_head(model.extract_feat(x)), model(x))


def test_an_exported_file_computes_the_scores(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, model = torch.tensor([[2.0, 0.0]]), build(run)
    monkeypatch.setattr(engine_choice, 'DeployedLogits', lambda file: File(logits))
    use_file_(model, 'a.onnx')
    found = model(torch.zeros(1, 3, 32, 32), mode='predict')
    assert found[0].pred_label.tolist() == [0]


class File(torch.nn.Module):
    """An exported file that gives the same scores for any images."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.logits,)
