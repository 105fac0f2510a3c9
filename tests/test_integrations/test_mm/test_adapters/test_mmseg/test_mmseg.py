# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Attention classes, decode heads and segmentors of mmsegmentation."""

import pytest
import torch
from torch import nn

pytest.importorskip('mmseg')
pytest.importorskip('mmdet')

from mmcv.cnn.bricks.non_local import NonLocal2d
from mmseg.models.backbones.swin import WindowMSA
from mmseg.models.decode_heads import FCNHead

from gplq_mm.convert import convert_, quantized_layers
from tests.helpers.attentions import randomized
from tests.helpers.identity import assert_identity
from tests.helpers.segmentors import ATTENTIONS, SEGMENTORS, segmentor

SKIPPED = [('auxiliary_head', 'runs in training only')]


@pytest.mark.parametrize('recipe', ['w4a4', 'gplq_w4a4_paper'])
@pytest.mark.parametrize('case', ATTENTIONS)
def test_attention_off_is_float(case: str, recipe: str) -> None:
    make, shape, extra = ATTENTIONS[case]
    report = assert_identity(
        randomized(make()), [torch.randn(shape)], lambda m, x: m(x[0], *extra), recipe
    )
    assert report.counts['matmul'] == 2
    assert report.kept_float == []


@pytest.mark.parametrize('name', SEGMENTORS)
def test_segmentor_off_is_float(name: str) -> None:
    model = segmentor(name)
    report = assert_identity(
        model, [torch.randn(2, 3, 32, 32)], lambda m, x: m(x[0], mode='tensor')
    )
    assert report.kept_float == SKIPPED
    assert any(n.startswith('decode_head') for n in report.quantized['conv'] + ['decode_head'])


@pytest.mark.parametrize('name', SEGMENTORS)
def test_default_scope_is_the_backbone(name: str) -> None:
    report = convert_(segmentor(name), 'w4a4', strict=True)
    assert report.scope == ('backbone',) and report.kept_float == []


@pytest.mark.parametrize(
    ('name', 'predictors'),
    [
        ('upernet', {'decode_head.conv_seg'}),
        ('segformer', {'decode_head.conv_seg'}),
        ('segmenter', {'decode_head.patch_proj', 'decode_head.classes_proj'}),
        ('ocrnet', {'decode_head.0.conv_seg', 'decode_head.1.conv_seg'}),
    ],
)
def test_predictors_have_eight_bits(name: str, predictors: set[str]) -> None:
    model = segmentor(name)
    convert_(model, dict(base='w4a4', scope='all'), strict=True)
    of_heads = {n: m for n, m in quantized_layers(model).items() if n.startswith('decode_head')}
    found = {n for n, m in of_heads.items() if m.weight_quantizer.spec.num_bits == 8}
    assert found == predictors and len(of_heads) > len(found)
    if name == 'segmenter':
        product = model.decode_head.mask_matmul
        assert [q.spec.num_bits for q in product.quantizers] == [8, 8]


def test_a_turned_off_product_of_masks_is_float() -> None:
    rule = dict(name='*mask_matmul*', enabled=False)
    recipe = dict(base='w4a4', scope='all', rules=[rule])
    images = [torch.randn(2, 3, 32, 32)]
    report = assert_identity(
        segmentor('segmenter'), images, lambda m, x: m(x[0], mode='tensor'), recipe
    )
    assert [n for n, _ in report.kept_float if 'mask' in n] == ['decode_head.mask_matmul']


def test_predictor_of_a_users_own_head() -> None:
    class MyHead(FCNHead):
        pass

    model = nn.ModuleDict({'decode_head': MyHead(in_channels=8, channels=4, num_classes=3)})
    convert_(model, dict(base='w4a4', scope='all'))
    assert model['decode_head'].conv_seg.weight_quantizer.spec.num_bits == 8


def test_products_without_a_handler_are_reported() -> None:
    model = nn.ModuleDict(
        {'block': NonLocal2d(8), 'attn': type('My', (WindowMSA,), {})(8, 2, (2, 2))}
    )
    report = convert_(model, dict(base='w4a4', scope='all'))
    assert [name for name, _ in report.kept_float if name == 'block.products'] == ['block.products']
