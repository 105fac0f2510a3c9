# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The builder: same class, same keys, same weights, plus quantizers."""

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip('mmpretrain')

from mmengine.model import PretrainedInit
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.models import ImageClassifier

import gplq_mm
from gplq_mm.analysis.start_error import quantization_keys
from gplq_mm.calibration import activation_ranges
from gplq_mm.convert import quantizers
from gplq_mm.distillation.mimicking import Mimicking
from gplq_mm.integrations.mm.builder import build_gplq
from tests.helpers.mm_models import CLASSIFIERS, calibrate_activations

BACKBONE = dict(
    type='VisionTransformer',
    arch=dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32),
    img_size=16,
    patch_size=8,
)
HEAD = dict(type='VisionTransformerClsHead', num_classes=3, in_channels=16, topk=(1,))
CLASSIFIER = dict(type='ImageClassifier', backbone=BACKBONE, head=HEAD)
PREPROCESSOR = dict(type='ClsDataPreprocessor', num_classes=3, mean=[1.0] * 3, std=[2.0] * 3)


@pytest.fixture(autouse=True)
def scope() -> Iterator[None]:
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        yield


def build(**options: Any) -> Any:
    torch.manual_seed(0)
    return MODELS.build(dict(type='gplq_mm.GPLQ', **copy.deepcopy(options)))


def flat(**options: Any) -> Any:
    given = {k: v for k, v in CLASSIFIER.items() if k != 'type'}
    return build(float_type='ImageClassifier', **{**given, **options})


def nested(model: Any = CLASSIFIER, **options: Any) -> Any:
    return build(model=model, **options)


def test_flat_and_nested_forms_give_the_same_model() -> None:
    one, two = flat().state_dict(), nested().state_dict()
    assert list(one) == list(two)
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert flat().gplq.recipe == nested().gplq.recipe
    assert flat().gplq.float_cfg == nested().gplq.float_cfg


def test_class_keys_and_weights_of_the_float_model_stay() -> None:
    torch.manual_seed(0)
    float_model = MODELS.build(copy.deepcopy(CLASSIFIER))
    model = flat()
    assert isinstance(model, ImageClassifier)
    assert type(model).__name__ == 'ImageClassifier'
    state, float_state = model.state_dict(), float_model.state_dict()
    assert set(state) - set(float_state) == quantization_keys(model)
    assert set(float_state) <= set(state)
    assert all(torch.equal(state[k], v) for k, v in float_state.items())
    assert all('_quantizer.' in k for k in quantization_keys(model))
    names = {n for n, _ in model.named_parameters()} - {
        n for n, _ in float_model.named_parameters()
    }
    assert all(n.endswith('_quantizer.scale') for n in names)


@pytest.mark.parametrize(
    'options', [dict(), dict(float_type='ImageClassifier', model=CLASSIFIER)], ids=['none', 'both']
)
def test_exactly_one_form_must_be_used(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"float_type='MaskRCNN'.*model=_base_\.model"):
        build(**options)


@pytest.mark.parametrize('kind', ['ImageClassifer', 'mmpretrain.ImageClassifer'])
def test_an_unknown_float_type_is_refused_with_the_close_ones(kind: str) -> None:
    with pytest.raises(ValueError, match=f"'{kind}' names no model .* 'ImageClassifier'"):
        build(float_type=kind)


def test_a_float_model_without_a_type_is_refused() -> None:
    with pytest.raises(ValueError, match="has no 'type'"):
        build(model={k: v for k, v in CLASSIFIER.items() if k != 'type'})


def test_arguments_beside_the_nested_model_are_refused() -> None:
    with pytest.raises(ValueError, match=r"does not take \['backbone'\].*_delete_=True"):
        nested(backbone=BACKBONE)


def test_the_config_is_not_changed() -> None:
    model = copy.deepcopy(CLASSIFIER)
    build_gplq(model=model, recipe='w4a4')
    assert model == CLASSIFIER


@pytest.mark.parametrize(
    'init_cfg',
    [
        dict(type='Pretrained', checkpoint='https://nowhere.invalid/a.pth'),
        dict(type=PretrainedInit, checkpoint='https://nowhere.invalid/a.pth'),
        [
            dict(type='TruncNormal', layer='Linear', std=0.5),
            dict(type='Pretrained', checkpoint='https://nowhere.invalid/a.pth'),
        ],
    ],
    ids=['name', 'class', 'list'],
)
def test_no_backbone_weights_are_fetched(init_cfg: Any) -> None:
    model = flat(backbone={**BACKBONE, 'init_cfg': init_cfg})
    model.init_weights()
    kept = model.gplq.float_cfg['backbone'].get('init_cfg')
    assert kept == ([init_cfg[0]] if isinstance(init_cfg, list) else None)


def test_the_runners_data_preprocessor_reaches_the_nested_model() -> None:
    model = nested(data_preprocessor=PREPROCESSOR)
    assert model.data_preprocessor.mean.flatten().tolist() == [1.0] * 3
    own = {**PREPROCESSOR, 'mean': [7.0] * 3}
    model = nested({**CLASSIFIER, 'data_preprocessor': own}, data_preprocessor=PREPROCESSOR)
    assert model.data_preprocessor.mean.flatten().tolist() == [7.0] * 3


@pytest.mark.parametrize(
    ('recipe', 'message'),
    [
        ('w4a5x', 'w4a5x'),
        (dict(base='w4a4', observers='mse'), 'observers'),
        (dict(base='w4a4', scope='bakbone'), 'bakbone'),
        (dict(base='w4a4', rules=[dict(name='*.nothing', num_bits=8)]), 'matches no layer'),
        (dict(base='w4a4', mimic=dict(type='featur')), 'featur'),
        (dict(base='w4a4', weight=dict(ptq='gptqq')), 'gptqq'),
        (dict(base='w4a4', calibration=dict(num_images=0)), 'num_images'),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(recipe: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flat(recipe=recipe)


def test_a_detectors_scope_is_its_backbone_and_it_stays_a_detector() -> None:
    pytest.importorskip('mmdet')
    from mmdet.models import RetinaNet

    from tests.helpers.mm_models import retinanet

    float_keys = set(retinanet().state_dict())
    coder = dict(type='DeltaXYWHBBoxCoder')
    anchors = dict(type='AnchorGenerator', scales=[4], ratios=[1.0], strides=[4, 8])
    head = dict(
        type='RetinaHead',
        num_classes=2,
        in_channels=16,
        feat_channels=16,
        stacked_convs=1,
        anchor_generator=anchors,
        bbox_coder=coder,
    )
    backbone = dict(
        type='SwinTransformer',
        embed_dims=8,
        depths=[2, 2],
        num_heads=[2, 4],
        strides=(4, 2),
        out_indices=(0, 1),
        window_size=4,
        mlp_ratio=2,
        convert_weights=False,
    )
    neck = dict(type='FPN', in_channels=[8, 16], out_channels=16, num_outs=2)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = build(float_type='RetinaNet', backbone=backbone, neck=neck, bbox_head=head)
    assert isinstance(model, RetinaNet)
    assert isinstance(model, Mimicking)
    assert [term['type'] for term in model.mimic['terms']] == ['feature']
    assert model.gplq.is_detector
    assert model.gplq.recipe.scope == 'backbone'
    assert all(name.startswith('backbone.') for name in quantizers(model))
    assert set(model.state_dict()) - quantization_keys(model) == float_keys


def calibrated(model: Any, images: torch.Tensor) -> Any:
    model.eval()
    calibrate_activations(model, lambda: model(images))
    return model


def test_a_copy_is_equal_and_independent() -> None:
    images = torch.randn(2, 3, 16, 16)
    model = calibrated(flat(), images)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(images)[0], model(images)[0])
    before = model(images)[0].clone()
    for quantizer in quantizers(copied, 'activation').values():
        quantizer.scale.data.mul_(3)
    assert torch.equal(model(images)[0], before)
    assert not torch.equal(copied(images)[0], before)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_a_step_under_autocast_is_finite(dtype: torch.dtype) -> None:
    images = torch.randn(2, 3, 16, 16)
    model = calibrated(flat(), images)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        with torch.autocast('cpu', dtype=dtype):
            features = model.extract_feat(images)
            loss = nn.functional.cross_entropy(model.head(features), torch.tensor([0, 1]))
        optimizer.zero_grad()
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        scales = [q.scale for q in quantizers(model, 'activation').values()]
        assert all(s.grad is not None and s.dtype == torch.float32 for s in scales)
        optimizer.step()


def test_scales_of_frozen_stages_are_frozen_from_the_start() -> None:
    """mmpretrain freezes in `train()`: an optimizer and DDP would have seen other parameters."""
    backbone = dict(CLASSIFIERS['swin'][0], frozen_stages=0)
    neck, head = dict(type='GlobalAveragePooling'), dict(HEAD, type='LinearClsHead', in_channels=32)
    model = flat(backbone=backbone, neck=neck, head=head)
    before = {n for n, p in model.named_parameters() if p.requires_grad}
    model.eval()
    model.train()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == before
    found = quantizers(model, 'activation')
    frozen = {n for n, q in found.items() if not q.scale.requires_grad}
    first = ('backbone.patch_embed', 'backbone.stages.0')
    assert frozen == {n for n in found if n.startswith(first)}


def test_a_timm_classifier_is_quantized_like_the_model_of_timm_in_it() -> None:
    create_model = pytest.importorskip('timm').create_model
    pytest.importorskip('mmpretrain')
    size = dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    cfg = dict(type='mmpretrain.TimmClassifier', model_name='vit_tiny_patch16_224', **size)
    recipe = dict(base='w8a8', mimic=None)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = build_gplq(model=cfg, recipe=recipe)
    bare = create_model('vit_tiny_patch16_224', **size)
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if '_quantizer.' not in k})
    assert gplq_mm.quantize(bare, recipe).counts == model.gplq.coverage.counts
    assert model.gplq.coverage.counts == {'linear': 9, 'conv': 1, 'matmul': 4}
    assert [type(m) for m in model.model.modules()] == [type(m) for m in bare.modules()]
    roles = [{n: q.role for n, q in quantizers(m).items()} for m in (model.model, bare)]
    assert roles[0] == roles[1] and 'predictor' in roles[0].values()
    x = torch.rand(4, 3, 32, 32)
    for network in (model, bare):
        with torch.no_grad():
            run = partial(network.eval(), x)
            activation_ranges.calibrate_activations(network, run)
    with torch.no_grad():
        assert torch.equal(model(x), bare(x))
