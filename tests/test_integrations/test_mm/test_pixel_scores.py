# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Logits of pixels, and stage 1's mimicking of segmentors."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip('mmseg')
pytest.importorskip('mmdet')

from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from gplq_mm.convert import facts_of, set_quantization
from gplq_mm.distillation.mimicking import Mimicking
from gplq_mm.integrations.mm import builder  # noqa: F401
from gplq_mm.integrations.mm.pixel_scores import SegmentorHead
from gplq_mm.registry import MODELS
from tests.helpers.mm_models import build
from tests.helpers.segmentors import SEGMENTORS, segmentor, segmentor_cfg


def batch() -> tuple[Tensor, list[SegDataSample]]:
    torch.manual_seed(0)
    samples = []
    for _ in range(2):
        sample = SegDataSample(metainfo=dict(img_shape=(32, 32), ori_shape=(32, 32)))
        sample.gt_sem_seg = PixelData(data=torch.randint(0, 3, (1, 32, 32)))
        samples.append(sample)
    return torch.randn(2, 3, 32, 32), samples


def quantized(name: str, mimic: Any = 'preset') -> Any:
    """A GPLQ segmentor with the float model as its teacher, all quantizers off."""
    cfg = segmentor_cfg(name)
    recipe = dict(base='w4a4') if mimic == 'preset' else dict(base='w4a4', mimic=mimic)
    model: Any = build(
        dict(cfg, type='gplq_mm.GPLQ', float_type=cfg['type'], recipe=recipe), 'mmseg'
    )
    teacher = segmentor(name)
    model.load_state_dict(teacher.state_dict(), strict=False)
    model.attach_teacher(teacher)
    set_quantization(model, False)
    return model


@pytest.mark.parametrize('name', SEGMENTORS)
def test_logits_are_those_of_the_model_and_of_its_loss(name: str) -> None:
    model: Any = segmentor(name)
    images, samples = batch()
    head = SegmentorHead.of(model)
    assert head is not None and not head.is_multi_label('') and head.lacking
    kept: list[Tensor] = []
    with torch.no_grad():
        maps = model(images, mode='tensor')
        logits = head.logits(model.extract_feat(images))
        with head.watched(model, kept.append):
            model.loss(images, samples)
        model.loss(images, samples)
    assert logits.shape == (maps.numel() // 3, 3)
    assert torch.equal(logits.view(*maps.shape[:1], *maps.shape[2:], 3).movedim(-1, 1), maps)
    assert len(kept) == 1 and torch.equal(kept[0], logits)


@pytest.mark.parametrize('name', ['upernet', 'ocrnet'])
def test_auto_compares_features_and_logits_in_one_pass_of_the_head(name: str) -> None:
    model = quantized(name)
    assert isinstance(model, Mimicking) and facts_of(model).scope == 'backbone'
    images, samples = batch()
    passes: list[int] = []
    heads = model.decode_head if name == 'ocrnet' else [model.decode_head]
    heads[-1].conv_seg.register_forward_hook(lambda *_: passes.append(1))
    losses = model.loss(images, samples)
    assert float(losses['loss_mimic_logits']) == float(losses['loss_mimic_feature']) == 0.0
    assert len(passes) == 1
    assert {'loss_mimic_logits', 'loss_mimic_feature'} < losses.keys()
    for parameter in model.backbone.parameters():
        parameter.data.mul_(1.05)
    losses = model.loss(images, samples)
    assert min(float(losses[f'loss_mimic_{k}']) for k in ('logits', 'feature')) > 0


def test_one_term_with_a_temperature() -> None:
    model = quantized('upernet', dict(type='logits', temperature=4.0))
    assert [t['type'] for t in model.mimic['terms']] == ['logits']
    losses = model.train().loss(*batch())
    (name,) = [key for key in losses if 'mimic' in key]
    losses[name].backward()  # dropout of the head makes it positive
    assert name == 'loss_mimic' and float(losses[name]) > 0


def test_a_segmentor_has_no_pooled_feature() -> None:
    with pytest.raises(ValueError, match='needs a classifier'):
        quantized('upernet', dict(type='feature', layer='penultimate'))


def stub(**options: Any) -> Any:
    losses = nn.ModuleList([nn.Identity()])
    given = dict(cls_seg=None, out_channels=3, num_classes=3, loss_decode=losses, **options)
    return SimpleNamespace(decode_head=SimpleNamespace(**given))


@pytest.mark.parametrize(
    ('model', 'found', 'multi_label'),
    [
        (nn.Identity(), False, None),
        (SimpleNamespace(decode_head=SimpleNamespace()), False, None),  # classifies masks
        (stub(), True, False),
    ],
)
def test_which_heads_classify_pixels(model: Any, found: bool, multi_label: bool | None) -> None:
    head = SegmentorHead.of(model)
    assert (head is not None) is found
    if head is not None:
        assert head.is_multi_label('') is multi_label


def test_one_channel_is_a_sigmoid_of_two_classes_and_no_score_of_one() -> None:
    model = stub()
    model.decode_head.out_channels, model.decode_head.num_classes = 1, 2
    head = SegmentorHead.of(model)
    assert head is not None and head.is_multi_label('')
    model.decode_head.num_classes = 1  # depth
    assert SegmentorHead.of(model) is None


def test_several_outputs_are_compared_in_the_one_that_predicts() -> None:
    class PIDHead:
        cls_seg, out_channels, num_classes = None, 3, 3

        def __call__(self, features: Tensor) -> tuple[Tensor, Tensor]:
            return features * 0, features

    model = SimpleNamespace(decode_head=PIDHead())
    head, maps = SegmentorHead.of(model), torch.randn(2, 3, 4, 5)
    assert head is not None
    assert torch.equal(head.logits(maps), maps.permute(0, 2, 3, 1).reshape(40, 3))


def test_builder_keeps_the_class() -> None:
    with DefaultScope.overwrite_default_scope('mmseg'):
        assert MODELS.get('mmseg.EncoderDecoder') in type(quantized('upernet')).__mro__
