# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import pytest
import torch
from torch import nn

pytest.importorskip('mmcv')
pytest.importorskip('mmdet')
pytest.importorskip('mmpretrain')

from mmcv.cnn import build_conv_layer, build_upsample_layer
from mmcv.cnn.bricks import wrappers
from mmcv.cnn.bricks.transformer import FFN, MultiheadAttention, PatchEmbed, PatchMerging

from gplq_mm.convert import convert_
from gplq_mm.ops import QuantConv2d, QuantConvTranspose2d, QuantLinear
from tests.helpers.identity import assert_identity

LAYERS = {
    'linear': (lambda: wrappers.Linear(6, 4), (2, 3, 6), QuantLinear),
    'conv': (
        lambda: build_conv_layer(dict(type='Conv'), 6, 4, 3, padding=1),
        (2, 6, 5, 5),
        QuantConv2d,
    ),
    'grouped_conv': (lambda: wrappers.Conv2d(6, 4, 3, groups=2), (2, 6, 5, 5), QuantConv2d),
    'deconv': (
        lambda: build_upsample_layer(
            dict(type='deconv', in_channels=6, out_channels=4, kernel_size=2, stride=2)
        ),
        (2, 6, 5, 5),
        QuantConvTranspose2d,
    ),
}


@pytest.mark.parametrize('recipe', ['w4a4', 'gplq_w4a4_paper'])
@pytest.mark.parametrize('name', LAYERS)
def test_wrappers(name: str, recipe: str) -> None:
    make, shape, quant_cls = LAYERS[name]
    model = nn.Sequential(make())
    report = assert_identity(model, [torch.randn(shape)], lambda m, x: m(x[0]), recipe)
    assert sum(report.counts.values()) == 1
    float_cls = type(model[0])
    convert_(model, dict(base=recipe, scope='all'))
    assert isinstance(model[0], quant_cls) and isinstance(model[0], float_cls)


def test_wrapper_on_an_empty_tensor() -> None:
    layer = wrappers.Conv2d(6, 4, 3, padding=1)
    convert_(layer, dict(base='w4a4', scope='all'))
    layer.input_quantizer.set_qparams(torch.ones(6), torch.zeros(6))
    out = layer(torch.zeros(0, 6, 5, 5))
    assert out.shape == (0, 4, 5, 5)
    out.sum().backward()


@pytest.mark.parametrize(
    ('act', 'num_fcs', 'roles'),
    [
        ('GELU', 2, ['input', 'post_gelu']),
        ('ReLU', 3, ['input', 'post_relu', 'post_relu']),
        ('SiLU', 2, ['input', 'input']),
    ],
)
def test_ffn(act: str, num_fcs: int, roles: list[str]) -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            FFN(8, 16, num_fcs, act_cfg=dict(type=act), ffn_drop=0.2, layer_scale_init_value=0.1)
        )

    assert_identity(make(), [torch.randn(2, 3, 8)], lambda m, x: m(x[0]))
    model = make()
    bits = {'input': 4, 'post_gelu': 6, 'post_relu': 7}
    rules = [dict(role=r, activation=dict(num_bits=b), optional=True) for r, b in bits.items()]
    convert_(model, dict(base='w4a4', scope='all', rules=rules))
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    assert [m.input_quantizer.spec.num_bits for m in layers] == [bits[r] for r in roles]


def test_patch_layers() -> None:
    embed = PatchEmbed(3, 8, kernel_size=4, stride=4, norm_cfg=dict(type='LN'))
    report = assert_identity(embed, [torch.randn(1, 3, 10, 9)], lambda m, x: m(x[0]))
    assert report.quantized['conv'] == ['projection']
    convert_(embed, dict(base='w4a4', scope='all'))
    assert embed.projection.input_quantizer.spec.num_bits == 8  # the image
    merging = PatchMerging(4, 8)
    report = assert_identity(merging, [torch.randn(1, 35, 4)], lambda m, x: m(x[0], (5, 7)))
    assert report.quantized['linear'] == ['reduction']


@pytest.mark.parametrize('batch_first', [True, False])
def test_multihead_attention(batch_first: bool) -> None:
    model = nn.ModuleDict(
        {'attn': MultiheadAttention(8, 2, attn_drop=0.2, proj_drop=0.2, batch_first=batch_first)}
    )
    mask = torch.tensor([[False, True, False]] * 3)

    def run(m: nn.Module, x: list[torch.Tensor]) -> torch.Tensor:
        return m['attn'](x[0], query_pos=x[1], attn_mask=mask)

    report = assert_identity(model, [torch.randn(3, 3, 8), torch.randn(3, 3, 8)], run)
    assert report.counts == {'linear': 4, 'conv': 0, 'matmul': 2}
    assert report.kept_float == []


def test_deformable_attention_says_what_stays_float() -> None:
    ops = pytest.importorskip('mmcv.ops')
    model = nn.ModuleDict({'attn': ops.MultiScaleDeformableAttention(8, 2, 1, 2)})
    report = convert_(model, dict(base='w4a4', scope='all'), strict=True)
    assert report.counts['linear'] == 4
    assert report.kept_float == [('attn.sampling', 'deformable sampling is no matrix product')]
