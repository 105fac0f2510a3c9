# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Mimicking: its terms against independent formulas; the teacher is no part of the model."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip('mmpretrain')

from mmengine.registry import MODELS, DefaultScope
from mmpretrain.structures import DataSample

from gplq_mm.convert import set_quantization
from gplq_mm.distillation.mimic_settings import resolve_mimic
from gplq_mm.distillation.mimicking import make_mimicking
from tests.helpers.mm_models import calibrate_activations
from tests.test_integrations.test_mm.test_builder import BACKBONE, CLASSIFIER, HEAD

LABELS = [0, 2, 1]


@pytest.fixture(autouse=True)
def scope() -> Iterator[None]:
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        yield


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 16, 16)


def samples() -> list[DataSample]:
    return [DataSample().set_gt_label(label) for label in LABELS]


def settings(kind: str) -> dict[str, Any]:
    found = resolve_mimic(dict(type=kind), False)
    assert found is not None
    return found


def make_student(images: Tensor, mimic: dict[str, Any]) -> Any:
    """A calibrated student whose teacher has the same float weights."""
    teacher = MODELS.build(copy.deepcopy(CLASSIFIER))
    recipe = dict(base='w3a3', activation=dict(observer='minmax'), mimic=mimic)
    student = MODELS.build(dict(type='gplq_mm.GPLQ', model=CLASSIFIER, recipe=recipe))
    with torch.no_grad():
        teacher.head.layers.head.weight.normal_(std=0.5)
    student.load_state_dict(teacher.state_dict(), strict=False)
    student.eval()
    calibrate_activations(student, lambda: student(images))
    student.attach_teacher(teacher)
    return student.train()


def test_the_teacher_is_no_part_of_the_model(images: Tensor) -> None:
    student = make_student(images, dict(type='feature'))
    teacher = student.teacher
    inside = {id(p) for p in teacher.parameters()}
    assert not inside & {id(p) for p in student.parameters()}
    assert teacher not in set(student.modules())
    assert not [k for k in student.state_dict() if 'teacher' in k or 'mimic' in k]
    assert not [n for n, _ in student.named_modules() if 'teacher' in n]
    student.train()
    assert not any(m.training for m in teacher.modules())
    losses = student.loss(images, samples())
    sum(v for k, v in losses.items() if 'loss' in k).backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert student.backbone.layers[0].ffn.layers[1].weight.grad.abs().sum() > 0


def test_feature_loss_is_the_relative_squared_error(images: Tensor) -> None:
    student = make_student(images, dict(type='feature', loss_weight=2.5))
    found = student.loss(images, samples())['loss_mimic'].item()
    ours = student.extract_feat(images)[-1].detach().numpy().astype(np.float64)
    theirs = student.teacher.extract_feat(images)[-1].numpy().astype(np.float64)
    expected = 2.5 * ((ours - theirs) ** 2).sum() / (theirs**2).sum()
    assert expected > 1e-3
    assert found == pytest.approx(expected, rel=1e-4)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def test_logits_loss_is_the_softened_divergence(images: Tensor) -> None:
    t = 2.0
    student = make_student(images, dict(type='logits', temperature=t))
    found = student.loss(images, samples())['loss_mimic'].item()
    logits = [m.head(m.extract_feat(images)).detach().double() for m in (student, student.teacher)]
    p, q = (log_softmax(x.numpy() / t) for x in logits)
    expected = t * t * (np.exp(q) * (q - p)).sum() / len(images)
    assert expected > 1e-4
    assert found == pytest.approx(expected, rel=1e-3)


def test_pca_loss_is_the_projected_squared_error(images: Tensor) -> None:
    student = make_student(images, dict(type='pca', explained_variance=1.0))
    many = torch.randn(40, 3, 16, 16)
    student.fit_mimic(lambda num_images: many.split(8))
    found = student.loss(images, samples())['loss_mimic'].item()
    features = [m.extract_feat(images)[-1].detach().double() for m in (student, student.teacher)]
    # 16 channels give at most 16 of the 32 components: the projection keeps the length
    expected = (features[0] - features[1]).square().sum(1).mean().item()
    assert expected > 1e-4
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize('kind', ['feature', 'logits', 'pca'])
def test_the_term_is_zero_while_quantizers_are_off(images: Tensor, kind: str) -> None:
    student = make_student(images, dict(type=kind))
    if kind == 'pca':
        many = torch.randn(40, 3, 16, 16)
        student.fit_mimic(lambda num_images: [many])
    assert student.loss(images, samples())['loss_mimic'] > 0
    set_quantization(student, False)
    assert student.loss(images, samples())['loss_mimic'].abs() < 1e-6


def test_task_weight_scales_the_models_own_losses_only(images: Tensor) -> None:
    student = make_student(images, dict(type='feature', task_weight=0.25))
    weighted = student.loss(images, samples())
    student.mimic['task_weight'] = 1.0
    plain = student.loss(images, samples())
    assert weighted['loss'].item() == pytest.approx(0.25 * plain['loss'].item())
    assert weighted['loss_mimic'].item() == plain['loss_mimic'].item()


def test_a_missing_teacher_is_explained(images: Tensor) -> None:
    student = make_student(images, dict(type='feature'))
    del student.__dict__['_teacher']
    with pytest.raises(RuntimeError, match=r"custom_hooks=\[dict\(type='gplq_mm\.GPLQHook'\)\]"):
        student.loss(images, samples())
    assert not student.__dict__.get('_recording')


def test_prediction_needs_no_teacher_and_keeps_no_features(images: Tensor) -> None:
    student = make_student(images, dict(type='feature'))
    student.eval()
    student.extract_feat(images)
    assert not student.__dict__.get('_recording')
    student.train().loss(images, samples())
    assert not student.__dict__.get('_recording')


class NoFeatures(nn.Module):
    """Has a loss, nothing else."""

    def loss(self, inputs: Tensor, data_samples: list) -> dict[str, Tensor]:
        return {'loss': inputs.sum()}


class IgnoresFeatures(NoFeatures):
    """Its loss looks at the image only."""

    def extract_feat(self, inputs: Tensor) -> Tensor:
        return inputs


def test_models_that_cannot_mimic_are_refused_when_they_are_built() -> None:
    with pytest.raises(TypeError, match=r'no extract_feat\(\).*mimic=None'):
        make_mimicking(NoFeatures(), settings('feature'))
    with pytest.raises(TypeError, match=r'no head.*mimic=None'):
        make_mimicking(IgnoresFeatures(), settings('logits'))
    with pytest.raises(TypeError, match=r"NoneType has no pre_logits\(\).*type='logits'"):
        make_mimicking(IgnoresFeatures(), settings('pca'))
    model = IgnoresFeatures()
    model.head = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r'Linear has no pre_logits\(\)'):
        make_mimicking(model, settings('pca'))


def test_a_loss_that_uses_no_features_is_explained() -> None:
    model: Any = IgnoresFeatures()
    make_mimicking(model, settings('feature'))
    model.attach_teacher(IgnoresFeatures())
    with pytest.raises(TypeError, match=r'loss\(\) does not call extract_feat\(\)'):
        model.loss(torch.ones(1), [])


def test_a_headless_classifier_has_no_logits_to_compare() -> None:
    backbone_only = dict(type='ImageClassifier', backbone=BACKBONE)
    with pytest.raises(TypeError, match='no head'):
        MODELS.build(dict(type='gplq_mm.GPLQ', model=backbone_only, recipe='w4a4'))
    recipe = dict(base='w4a4', mimic=None)
    model = MODELS.build(dict(type='gplq_mm.GPLQ', model=backbone_only, recipe=recipe))
    assert not hasattr(model, 'mimic')
    assert HEAD['type'] not in str(model)
