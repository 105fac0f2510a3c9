# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""`tools/test.py --engine`: settings, refusals, and models whose parts a file computes."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from torch import nn

from gplq_mm.integrations.mm.deployment import engine_choice
from gplq_mm.integrations.mm.deployment.engine_choice import (
    choose_engine,
    heads_checkpoint,
    set_inference_,
    use_file_,
)
from gplq_mm.integrations.mm.launch.errors import ConfigError

GPLQ = dict(type='gplq_mm.GPLQ')


def config(model=GPLQ, scope='mmdet') -> Config:
    return Config(dict(model=dict(model), default_scope=scope))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ('a.onnx', 'a.xml', 'final.pth'):
        Path(name).write_text('x')
    return tmp_path


@pytest.mark.parametrize(
    ('file', 'engine', 'chosen'),
    [
        ('final.pth', None, None),
        ('final.pth', 'integer', 'integer'),
        ('a.onnx', None, 'onnxruntime'),
        ('a.xml', 'openvino', 'openvino'),
    ],
)
def test_the_file_names_the_engine(folder: Path, file, engine, chosen) -> None:
    assert choose_engine(config(), 'c.py', file, engine) == chosen


@pytest.mark.parametrize(
    ('model', 'file', 'engine', 'message'),
    [
        (GPLQ, 'a.onnx', 'integer', '--engine onnxruntime'),
        (GPLQ, 'a.xml', 'onnxruntime', '--engine openvino'),
        (GPLQ, 'final.pth', 'openvino', 'deploy.py c.py final.pth -o final.xml'),
        (GPLQ, 'missing.onnx', None, 'no file at'),
        (dict(type='MaskRCNN'), 'final.pth', 'integer', 'its model is float'),
        (dict(type='MaskRCNN'), 'a.onnx', None, 'give the GPLQ config'),
    ],
)
def test_a_wrong_combination_is_refused(folder: Path, model, file, engine, message) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_engine(config(model), 'c.py', file, engine)


@pytest.mark.parametrize('engine', ['reference', dict(type='reference', ffn='layers'), None])
def test_inference_is_set_and_the_rest_kept(engine) -> None:
    cfg = config({**GPLQ, **({'engine': engine} if engine else {})})
    set_inference_(cfg, 'integer')
    assert cfg.model.engine.inference == 'integer'
    assert cfg.model.engine.type == ('reference' if engine else 'fused')


def test_heads_of_a_detector_are_required_and_of_a_classifier_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match='--heads gplq_final.pth'):
        heads_checkpoint(config(), 'a.onnx', None)
    torch.save(dict(state_dict={}), 'a.pth')
    assert heads_checkpoint(config(), 'a.onnx', None) == 'a.pth'
    classifier = config(scope='mmpretrain')
    assert heads_checkpoint(classifier, 'a.onnx', None) is None
    with pytest.raises(ConfigError, match='--heads has no effect'):
        heads_checkpoint(classifier, 'a.onnx', 'a.pth')


def test_a_file_gives_the_logits_of_a_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    models = pytest.importorskip('mmpretrain.models')
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    library = SimpleNamespace(OnnxModel=lambda file: lambda images: (logits,))
    monkeypatch.setattr(engine_choice, 'import_module', lambda name: library)
    model = models.ImageClassifier(
        dict(type='mmpretrain.VisionTransformer', arch='deit-t', img_size=32, patch_size=16),
        head=dict(type='mmpretrain.VisionTransformerClsHead', num_classes=3, in_channels=192),
    ).eval()
    use_file_(model, 'a.onnx')
    found = model(torch.zeros(1, 3, 32, 32), mode='predict')
    assert found[0].pred_label.tolist() == [1]
    torch.testing.assert_close(found[0].pred_score, logits[0].softmax(0))
    assert isinstance(model.backbone, nn.Module) and not model.with_neck
