# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Penultimate features of each classifier family, named layers, several heads and terms."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip('mmpretrain')
pytest.importorskip('mmdet')

from mmengine.registry import MODELS, DefaultScope
from mmpretrain.structures import DataSample, MultiTaskDataSample

from gplq_mm.distillation.mimic_features import Recording, as_rows, penultimate, run_teacher
from gplq_mm.distillation.score_head import SCORES
from tests.helpers.mm_models import CLASSIFIERS, calibrate_activations, classifier
from tests.test_integrations.test_mm.test_builder import BACKBONE, CLASSIFIER, HEAD


@pytest.fixture(autouse=True)
def scope() -> Iterator[None]:
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        yield


def last_layers(model: Any) -> list[nn.Module]:
    """The layers that give the class scores."""
    if hasattr(model.head, 'fc'):
        return [model.head.fc]
    return [m for n, m in model.head.layers.named_children() if n.startswith('head')]


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_the_penultimate_feature_is_what_the_last_layers_see(name: str) -> None:
    model: Any = classifier(name)
    seen: list[Tensor] = []
    for layer in last_layers(model):
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        features = model.extract_feat(torch.randn(3, 3, 32, 32))
        model.head(features)
        found = penultimate(model, features)
    assert len(seen) == (2 if name == 'deit' else 1)
    assert torch.equal(found, torch.cat(seen, -1))
    assert found.shape == (3, 16 * len(seen))


TASKS = dict(
    type='MultiTaskHead',
    task_heads=dict(
        color=dict(type='LinearClsHead', num_classes=3),
        shape=dict(type='LinearClsHead', num_classes=2),
    ),
    in_channels=16,
)
POOLED = dict(**BACKBONE, out_type='avg_featmap')
MULTI = dict(type='ImageClassifier', backbone=POOLED, head=TASKS)


def make_student(cfg: dict[str, Any], mimic: Any) -> Any:
    teacher = MODELS.build(copy.deepcopy(cfg))
    recipe = dict(base='w3a3', activation=dict(observer='minmax'), mimic=mimic)
    student = MODELS.build(dict(type='gplq_mm.GPLQ', model=cfg, recipe=recipe))
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if name.startswith('head.'):
                parameter.normal_(std=0.5)
    student.load_state_dict(teacher.state_dict(), strict=False)
    images = torch.randn(3, 3, 16, 16)
    student.eval()
    calibrate_activations(student, lambda: student(images))
    student.attach_teacher(teacher)
    student.fit_mimic(lambda num_images: torch.randn(40, 3, 16, 16).split(8))
    return student.train()


def multi_sample() -> MultiTaskDataSample:
    sample = MultiTaskDataSample()
    for task in ('color', 'shape'):
        sample.set_field(DataSample().set_gt_label(1), task)
    return sample


def test_several_heads_are_distilled_each_and_share_one_feature() -> None:
    student = make_student(MULTI, [dict(type='logits'), dict(type='pca')])
    images = torch.randn(3, 3, 16, 16)
    losses = student.loss(images, [multi_sample() for _ in range(3)])
    assert losses['loss_mimic_pca'] > 0
    expected = 0.0
    for head, ours in student.teacher.head.task_heads.items():
        log_q = ours(student.teacher.extract_feat(images)).log_softmax(-1)
        log_p = student.head.task_heads[head](student.extract_feat(images)).log_softmax(-1)
        expected += (log_q.exp() * (log_q - log_p)).sum().item() / 3
    assert losses['loss_mimic_logits'].item() == pytest.approx(expected, rel=1e-3)
    assert penultimate(student, student.extract_feat(images)).shape == (3, 16)
    sum(v for k, v in losses.items() if 'loss' in k).backward()


def samples() -> list[DataSample]:
    return [DataSample().set_gt_label(label) for label in (0, 2, 1)]


def test_a_named_layers_output_is_compared() -> None:
    layer = 'backbone.layers.0'
    student = make_student(CLASSIFIER, [dict(type='feature', layer=layer), dict(type='logits')])
    images = torch.randn(3, 3, 16, 16)
    found = student.loss(images, samples())['loss_mimic_feature'].item()
    seen: list[Tensor] = []
    for model in (student, student.teacher):
        handle = model.get_submodule(layer).register_forward_hook(lambda *a: seen.append(a[2]))
        model.extract_feat(images)
        handle.remove()
    ours, theirs = (x.detach().double() for x in seen)
    expected = (ours - theirs).square().sum() / theirs.square().sum()
    assert found == pytest.approx(expected.item(), rel=1e-4)
    assert not student.get_submodule(layer)._forward_hooks


def test_pca_of_a_layer_takes_its_tokens_for_samples() -> None:
    student = make_student(CLASSIFIER, dict(type='pca', layer='backbone.layers.1'))
    ((settings, components),) = student.mimic_state()['bases']
    assert settings['layer'] == 'backbone.layers.1'
    assert components.shape == (16, 16)
    assert student.loss(torch.randn(3, 3, 16, 16), samples())['loss_mimic'] > 0
    assert as_rows(torch.ones(2, 5, 4), 'x').shape == (10, 4)
    with pytest.raises(ValueError, match=r"layer='x' gives \(4,\); PCA needs"):
        as_rows(torch.ones(4), 'x')


def test_the_teachers_head_runs_where_a_layer_lies_in_it() -> None:
    layer = 'head.layers.head'
    teacher = MODELS.build(copy.deepcopy(CLASSIFIER)).eval()
    recording = run_teacher(teacher, torch.randn(2, 3, 16, 16), [layer])
    assert recording.samples(layer).shape == (2, 3)
    assert not recording.samples(layer).requires_grad


@pytest.mark.parametrize('layer', ['backbone.layer.1', 'backbone.layers.9'])
def test_an_unknown_layer_is_an_error_when_the_model_is_built(layer: str) -> None:
    with pytest.raises(ValueError, match=rf"layer='{layer}' names no module.*backbone\.layers\.1"):
        make_student(CLASSIFIER, dict(type='feature', layer=layer))


def test_a_layer_that_does_not_run_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"layer='head\.loss_module' did not run"):
        Recording(nn.Linear(1, 1)).levels('head.loss_module')


def test_a_basis_is_reused_where_its_settings_are_the_same() -> None:
    student = make_student(CLASSIFIER, dict(type='pca'))
    state = copy.deepcopy(student.mimic_state())
    refused: Any = None
    student.fit_mimic(refused, state)
    assert torch.equal(student.mimic_state()['bases'][0][1], state['bases'][0][1])
    state['bases'][0][0]['explained_variance'] = 0.1
    with pytest.raises(TypeError):
        student.fit_mimic(refused, state)


def test_several_heads_in_a_list_are_refused() -> None:
    heads = [CLASSIFIER['head'], CLASSIFIER['head']]
    with pytest.raises(ValueError, match=r"2 heads in a list.*type='MultiTaskHead'"):
        MODELS.build(dict(type='gplq_mm.GPLQ', model={**CLASSIFIER, 'head': heads}))


SWIN = dict(
    type='ImageClassifier',
    backbone=CLASSIFIERS['swin'][0],
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=3, in_channels=32),
)


@pytest.mark.parametrize('layer', ['backbone.stages.0', 'backbone.patch_embed'])
def test_a_stage_that_gives_a_size_beside_its_tokens(layer: str) -> None:
    model: Any = MODELS.build(copy.deepcopy(SWIN))
    found = run_teacher(model, torch.randn(2, 3, 32, 32), [layer])
    (tokens,) = found.levels(layer)
    assert tokens.dim() == 3 and found.samples(layer).shape[1] == tokens.shape[2]
    found.outputs[layer] = (4, 4)
    with pytest.raises(ValueError, match=rf"layer='{layer}' gives tuple, not a feature map"):
        found.levels(layer)


def test_labels_that_are_not_exclusive_are_distilled_one_by_one() -> None:
    head = dict(type='MultiLabelLinearClsHead', num_classes=3, in_channels=16)
    neck = dict(type='GlobalAveragePooling')
    backbone = dict(BACKBONE, out_type='featmap')
    cfg = dict(type='ImageClassifier', backbone=backbone, neck=neck, head=head)
    student = make_student(cfg, dict(type='logits'))
    (term,) = student.__dict__['_terms']
    ours, theirs = Recording(student), Recording(student.teacher)
    theirs.outputs[SCORES] = torch.randn(3, 3)
    ours.outputs[SCORES] = theirs.outputs[SCORES] + 5
    assert term(ours, theirs) > 1
    student.head = MODELS.build(HEAD)
    assert term(Recording(student, None, ours.outputs), theirs) < 1e-5
