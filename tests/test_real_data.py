# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Trained FP32 models on real data: nothing changes with quantizers off, little at 4 bits."""

import io
import zipfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

pytest.importorskip('mmdet')
pytest.importorskip('mmpretrain')

from gplq_mm.calibration.activation_ranges import calibrate_activations
from gplq_mm.convert import set_quantization
from gplq_mm.integrations.mm.checkpoints.checkpoint_io import read_checkpoint
from gplq_mm.integrations.mm.checkpoints.run_checkpoint import load_float_
from gplq_mm.ptq.stage2 import run_stage2


def build(data: Path, name: str, recipe: Any) -> tuple[nn.Module, nn.Module, Config]:
    """The float model, the converted model with the same weights, and the config."""
    config, checkpoint = data / 'models' / f'{name}.py', data / 'models' / f'{name}.pth'
    if not config.is_file():
        pytest.skip(f'no trained model at {config}')
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    float_model = MODELS.build(cfg.model).eval()
    float_model.load_state_dict(read_checkpoint(checkpoint)['state_dict'])
    gplq = {**cfg.model, 'type': 'gplq_mm.GPLQ', 'float_type': cfg.model.type, 'recipe': recipe}
    model = MODELS.build(gplq).eval()
    load_float_(model, read_checkpoint(checkpoint))
    return float_model, model, cfg


@pytest.mark.parametrize('scope', ['backbone', 'all'])
def test_nuclei_detector_with_quantizers_off_is_the_float_detector(
    gplq_data: Path, scope: str
) -> None:
    float_model, model, _ = build(
        gplq_data, 'mask_rcnn_swin_dsb2018', {'base': 'w4a4', 'scope': scope}
    )
    set_quantization(model, False)
    images = sorted((gplq_data / 'data/dsb2018/images').glob('*'))[:2]
    for path in images:
        image = cv2.resize(cv2.imread(str(path)), (160, 128))
        batch = {'inputs': [torch.from_numpy(image).permute(2, 0, 1)], 'data_samples': [sample()]}
        ours, theirs = (m.test_step(dict(batch))[0].pred_instances for m in (model, float_model))
        assert len(theirs) > 0
        for key in ('bboxes', 'scores', 'labels', 'masks'):
            assert torch.equal(torch.as_tensor(ours[key]), torch.as_tensor(theirs[key])), key


def sample() -> Any:
    from mmdet.structures import DetDataSample

    metainfo = {'img_shape': (128, 160), 'ori_shape': (128, 160), 'scale_factor': (1.0, 1.0)}
    return DetDataSample(metainfo=metainfo)


def cifar(data: Path, split: str, count: int) -> tuple[Tensor, Tensor]:
    """Evenly spaced CIFAR-10 images, uint8 ``(N, 3, 32, 32)`` in BGR, and their labels."""
    archive = data / 'data/cifar10/cifar10_jpeg.zip'
    if not archive.is_file():
        pytest.skip(f'no CIFAR-10 at {archive}')
    with zipfile.ZipFile(archive) as file:
        names = sorted(n for n in file.namelist() if f'{split}/' in n and n.endswith('.jpg'))
        classes = sorted({n.split('/')[-2] for n in names})
        chosen = names[:: len(names) // count][:count]
        raw = [np.frombuffer(io.BytesIO(file.read(n)).getvalue(), np.uint8) for n in chosen]
    images = np.stack([cv2.imdecode(r, cv2.IMREAD_COLOR) for r in raw])
    labels = torch.tensor([classes.index(n.split('/')[-2]) for n in chosen])
    return torch.from_numpy(images).permute(0, 3, 1, 2), labels


@torch.no_grad()
def top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Accuracy in percent."""
    inputs = model.data_preprocessor({'inputs': images})['inputs']
    predictions = torch.cat([model(part).argmax(1) for part in inputs.split(250)])
    return 100 * (predictions == labels).float().mean().item()


@pytest.mark.parametrize(('recipe', 'points'), [('w8a8', 0.6), ('w4a4', 2.5)])
def test_cifar_classifier_loses_little_without_any_training(
    gplq_data: Path, recipe: str, points: float
) -> None:
    float_model, model, _ = build(gplq_data, 'vit_cifar10', recipe)
    images, labels = cifar(gplq_data, 'test', 1000)
    training, _ = cifar(gplq_data, 'train', 32)
    set_quantization(model, False)
    fp32 = top1(float_model, images, labels)
    assert fp32 > 66
    assert top1(model, images, labels) == fp32
    set_quantization(model, True)

    def run_pass() -> None:
        with torch.no_grad():
            model(model.data_preprocessor({'inputs': training})['inputs'])

    calibrate_activations(model, run_pass)
    run_stage2(model, model.gplq.recipe, run_pass)
    assert top1(model, images, labels) >= fp32 - points
