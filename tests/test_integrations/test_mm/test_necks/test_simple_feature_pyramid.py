# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import init_default_scope

pytest.importorskip('mmcv')

from mmcv.cnn import ConvModule

from gplq_mm.integrations.mm.necks import LayerNorm2d, SimpleFeaturePyramid
from gplq_mm.registry import MODELS

DIMS, OUT = 16, 8


def make_neck(**kwargs) -> SimpleFeaturePyramid:
    """A neck whose norms are no identity."""
    neck = SimpleFeaturePyramid(
        **{'backbone_channel': DIMS, 'out_channels': OUT, 'num_outs': 5, **kwargs}
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in neck.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return neck


def expected_keys() -> set[str]:
    """What mmdet's ViTDet checkpoints call the neck's tensors."""
    keys = {
        f'{layer}.{kind}'
        for layer in ('fpn1.0', 'fpn1.1', 'fpn1.3', 'fpn2.0')
        for kind in ('weight', 'bias')
    }
    for i in range(4):
        for convs in ('lateral_convs', 'fpn_convs'):
            keys |= {
                f'{convs}.{i}.{name}'
                for name in ('conv.weight', 'norm_layer.weight', 'norm_layer.bias')
            }
    return keys


def norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5
) -> torch.Tensor:
    """The formula of mmdet's `LN2d`; x is `(B, C, H, W)`."""
    mean = x.mean(1, keepdim=True)
    var = (x - mean).pow(2).mean(1, keepdim=True)
    return (x - mean) / torch.sqrt(var + eps) * weight[:, None, None] + bias[:, None, None]


def pyramid(x: torch.Tensor, state: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The neck written out from its state dict, with mmdet's own norm formula."""
    up = [
        F.conv_transpose2d(x, state[f'fpn{i}.0.weight'], state[f'fpn{i}.0.bias'], stride=2)
        for i in (1, 2)
    ]
    up[0] = F.gelu(norm(up[0], state['fpn1.1.weight'], state['fpn1.1.bias']))
    up[0] = F.conv_transpose2d(up[0], state['fpn1.3.weight'], state['fpn1.3.bias'], stride=2)
    outs = []
    for i, level in enumerate([*up, x, F.max_pool2d(x, 2, 2)]):
        for convs, padding in (('lateral_convs', 0), ('fpn_convs', 1)):
            name = f'{convs}.{i}'
            level = F.conv2d(level, state[f'{name}.conv.weight'], padding=padding)
            level = norm(
                level, state[f'{name}.norm_layer.weight'], state[f'{name}.norm_layer.bias']
            )
        outs.append(level)
    return [*outs, outs[-1][..., ::2, ::2]]


def test_keys_are_those_of_the_vitdet_checkpoints():
    assert set(make_neck().state_dict()) == expected_keys()


def test_numbers_are_those_of_the_vitdet_neck():
    neck, x = make_neck(), torch.randn(2, DIMS, 6, 4, generator=torch.Generator().manual_seed(1))
    outs = neck((x,))
    for out, expected in zip(outs, pyramid(x, neck.state_dict()), strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_takes_a_map_or_a_sequence_of_one():
    neck, x = make_neck(), torch.randn(1, DIMS, 4, 4)
    for one, other in zip(neck(x), neck([x]), strict=True):
        assert torch.equal(one, other)
    assert [tuple(out.shape[1:]) for out in neck(x)] == [(OUT, s, s) for s in (16, 8, 4, 2, 1)]


def test_refuses_several_maps():
    x = torch.randn(1, DIMS, 4, 4)
    with pytest.raises(ValueError, match=r'got 2; write `out_indices=-1`'):
        make_neck()((x, x))


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        ({'backbone_channel': 18}, 'multiple of 4, got 18'),
        ({'in_channels': [4, 4, 16, 16]}, r'must be \[4, 8, 16, 16\].*got \[4, 4, 16, 16\]'),
        ({'in_channels': []}, r'got \[\]'),
        ({'num_outs': 3}, 'number of levels, 4; got 3'),
    ],
)
def test_refuses_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_neck(**kwargs)


def test_fewer_levels():
    outs = make_neck(in_channels=[4, 8, 16], num_outs=3)(torch.randn(1, DIMS, 4, 4))
    assert [out.shape[-1] for out in outs] == [16, 8, 4]


def test_all_parameters_get_a_gradient():
    neck = make_neck()
    sum(out.square().mean() for out in neck(torch.randn(1, DIMS, 4, 4))).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in neck.parameters())


def test_vit_sam_feeds_the_neck():
    pytest.importorskip('mmpretrain')
    arch = dict(
        embed_dims=DIMS, num_layers=2, num_heads=2, feedforward_channels=32, global_attn_indexes=[1]
    )
    backbone = MODELS.build(
        dict(type='mmpretrain.ViTSAM', arch=arch, img_size=64, window_size=3, out_channels=0)
    )
    features = backbone(torch.randn(1, 3, 64, 64))
    assert isinstance(features, tuple)
    assert [out.shape[-1] for out in make_neck()(features)] == [16, 8, 4, 2, 1]


def test_layer_norm_is_found_from_another_scope_and_keeps_its_name():
    pytest.importorskip('mmdet')
    init_default_scope('mmdet')
    module = ConvModule(3, 4, 1, norm_cfg=dict(type='gplq_mm.LN2d'))
    assert isinstance(module.norm_layer, LayerNorm2d)
    assert module.norm_layer.eps == 1e-5


def test_layer_norm_formula():
    layer, x = LayerNorm2d(5, eps=1e-3), torch.randn(2, 5, 3, 4)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    out = layer(x)
    assert out.is_contiguous()
    torch.testing.assert_close(out, norm(x, layer.weight, layer.bias, 1e-3))
    with pytest.raises(ValueError, match='got 0'):
        LayerNorm2d(0)
