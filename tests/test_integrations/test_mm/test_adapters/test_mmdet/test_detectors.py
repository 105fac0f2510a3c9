# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import pytest
import torch
from mmengine.registry import init_default_scope
from torch import nn

pytest.importorskip('mmdet')
pytest.importorskip('mmpretrain')

from mmdet.models.backbones.swin import ShiftWindowMSA, WindowMSA
from mmdet.models.dense_heads import FCOSHead, RetinaHead
from mmdet.models.layers.transformer import DetrTransformerDecoderLayer

from gplq_mm.convert import convert_, quantized_layers
from tests.helpers.identity import assert_identity
from tests.helpers.mm_models import DETECTORS, run_detector

MASK = torch.where(torch.arange(162).view(2, 9, 9) % 3 > 0, 0, -100)
PREDICTORS = {
    'mask_rcnn': {
        'rpn_head.rpn_cls',
        'rpn_head.rpn_reg',
        'roi_head.bbox_head.fc_cls',
        'roi_head.bbox_head.fc_reg',
        'roi_head.mask_head.conv_logits',
    },
    'cascade_rcnn': {
        'rpn_head.rpn_cls',
        'rpn_head.rpn_reg',
        *(f'roi_head.bbox_head.{i}.fc_{kind}' for i in (0, 1) for kind in ('cls', 'reg')),
        *(f'roi_head.mask_head.{i}.conv_logits' for i in (0, 1)),
    },
    'retinanet': {'bbox_head.retina_cls', 'bbox_head.retina_reg'},
}


@pytest.mark.parametrize('recipe', ['w4a4', 'gplq_w4a4_paper'])
@pytest.mark.parametrize('mask', [None, MASK], ids=['all', 'mask'])
def test_window_msa(mask: torch.Tensor | None, recipe: str) -> None:
    model = nn.ModuleDict({'msa': WindowMSA(16, 2, (3, 3), attn_drop_rate=0.2)})
    nn.init.normal_(model['msa'].relative_position_bias_table)
    report = assert_identity(
        model, [torch.randn(4, 9, 16)], lambda m, x: m['msa'](x[0], mask), recipe
    )
    assert report.counts == {'linear': 2, 'conv': 0, 'matmul': 2}


def test_shift_window_msa() -> None:
    model = nn.ModuleDict({'attn': ShiftWindowMSA(16, 2, 3, shift_size=1, qk_scale=0.3)})
    report = assert_identity(model, [torch.randn(2, 20, 16)], lambda m, x: m['attn'](x[0], (4, 5)))
    assert report.counts['matmul'] == 2
    assert report.kept_float == []


@pytest.mark.parametrize('name', DETECTORS)
def test_detector_off_is_float(name: str) -> None:
    model = DETECTORS[name]()
    backbone_and_neck = assert_identity(
        model, [torch.randn(1, 3, 40, 56)], lambda m, x: m.extract_feat(x[0])
    )
    assert backbone_and_neck.kept_float == []
    converted = DETECTORS[name]()
    convert_(converted, dict(base='w4a4', scope='all'))
    for module in converted.modules():
        if hasattr(module, 'enabled'):
            module.enabled = False
    images = torch.randn(2, 3, 40, 56)
    with torch.no_grad():
        expected, actual = (run_detector(m, images) for m in (model, converted))
    _assert_equal(expected, actual)


def _assert_equal(a: object, b: object) -> None:
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            _assert_equal(left, right)


@pytest.mark.parametrize('name', DETECTORS)
def test_predictors(name: str) -> None:
    model = DETECTORS[name]()
    rules = [dict(role='predictor', num_bits=6)]
    convert_(model, dict(base='w4a4', scope='all', rules=rules), strict=True)
    found = {n for n, m in quantized_layers(model).items() if m.weight_quantizer.spec.num_bits == 6}
    assert found == PREDICTORS[name]


def test_upsample_of_the_mask_head_is_quantized() -> None:
    model = DETECTORS['mask_rcnn']()
    report = convert_(model, dict(base='w4a4', scope='all'))
    assert 'roi_head.mask_head.upsample' in report.quantized['conv']


def test_predictors_of_a_users_own_head() -> None:
    class MyHead(FCOSHead):
        pass

    init_default_scope('mmdet')
    model = nn.ModuleDict(
        {'bbox_head': MyHead(2, 16, feat_channels=8, stacked_convs=1, norm_cfg=None)}
    )
    convert_(model, dict(base='w4a4', scope='all', rules=[dict(role='predictor', num_bits=6)]))
    layers = quantized_layers(model)
    found = {n for n, m in layers.items() if m.weight_quantizer.spec.num_bits == 6}
    assert found == {f'bbox_head.conv_{kind}' for kind in ('cls', 'reg', 'centerness')}
    assert not issubclass(MyHead, RetinaHead)


def test_detr_decoder_layer() -> None:
    attention = dict(embed_dims=16, num_heads=2, dropout=0.1, batch_first=True)
    layer = DetrTransformerDecoderLayer(
        self_attn_cfg=attention,
        cross_attn_cfg=attention,
        ffn_cfg=dict(embed_dims=16, feedforward_channels=32),
    )
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])

    def run(m: nn.Module, x: list[torch.Tensor]) -> torch.Tensor:
        return m(x[0], x[1], x[1], query_pos=x[2], key_padding_mask=padding)

    inputs = [torch.randn(2, 3, 16), torch.randn(2, 5, 16), torch.randn(2, 3, 16)]
    report = assert_identity(layer, inputs, run)
    assert report.counts == {'linear': 10, 'conv': 0, 'matmul': 4}
    assert report.kept_float == []
