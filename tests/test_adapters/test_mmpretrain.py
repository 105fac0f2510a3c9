# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import pytest
import torch
from torch import nn

pytest.importorskip('mmpretrain')
pytest.importorskip('mmdet')

from mmpretrain.models.backbones import efficientformer, hivit, levit, vit_sam
from mmpretrain.models.backbones.vit_eva02 import AttentionWithRoPE
from mmpretrain.models.utils import (
    BEiTAttention,
    LeAttention,
    MultiheadAttention,
    RotaryEmbeddingFast,
    ShiftWindowMSA,
    WindowMSA,
    WindowMSAV2,
)

from gplq_mm.conversion import convert_
from tests.helpers.identity import assert_identity, assert_only_quantizer_keys
from tests.helpers.mm_models import CLASSIFIERS, classifier
from tests.helpers.mm_models import vit_sam as tiny_vit_sam

TOKENS = (2, 9, 16)
MASK = torch.where(torch.rand(2, 9, 9, generator=torch.Generator().manual_seed(0)) > 0.5, 0, -100)
SHIFT = dict(shift_size=1, pad_small_map=True)


def _rope() -> nn.Module:
    return RotaryEmbeddingFast(embed_dims=8, patch_resolution=(3, 3))


CASES = {
    'mha': (lambda: MultiheadAttention(16, 2, attn_drop=0.2, proj_drop=0.2), TOKENS, ()),
    'mha_no_bias': (lambda: MultiheadAttention(16, 4, qkv_bias=False), TOKENS, ()),
    'mha_qk_scale': (lambda: MultiheadAttention(16, 2, qk_scale=0.3), TOKENS, ()),
    'mha_shortcut': (
        lambda: MultiheadAttention(16, 1, input_dims=12, v_shortcut=True),
        (2, 9, 12),
        (),
    ),
    'mha_layer_scale': (
        lambda: MultiheadAttention(16, 2, layer_scale_init_value=0.1),
        TOKENS,
        (),
    ),
    'window': (lambda: WindowMSA(16, (3, 3), 2, attn_drop=0.2), (4, 9, 16), ()),
    'window_mask': (lambda: WindowMSA(16, (3, 3), 2, qk_scale=0.3), (4, 9, 16), (MASK,)),
    'window_v2': (lambda: WindowMSAV2(16, (3, 3), 2, attn_drop=0.2), (4, 9, 16), ()),
    'window_v2_mask': (lambda: WindowMSAV2(16, (3, 3), 2, qkv_bias=False), (4, 9, 16), (MASK,)),
    'shift': (lambda: ShiftWindowMSA(16, 2, 3, **SHIFT), (2, 20, 16), ((4, 5),)),
    'shift_v2': (
        lambda: ShiftWindowMSA(16, 2, 3, window_msa=WindowMSAV2, **SHIFT),
        (2, 20, 16),
        ((4, 5),),
    ),
    'beit': (lambda: BEiTAttention(16, 2, (2, 4), True, attn_drop_rate=0.2), TOKENS, ()),
    'beit_bias': (lambda: BEiTAttention(16, 2, None, False, bias=True), TOKENS, ()),
    'beit_shared': (
        lambda: BEiTAttention(16, 2, None, False),
        TOKENS,
        (torch.linspace(-1, 1, 162).view(2, 9, 9),),
    ),
    'rope': (lambda: AttentionWithRoPE(16, 2, rope=_rope()), (2, 10, 16), ((3, 3),)),
    'rope_no_cls': (
        lambda: AttentionWithRoPE(16, 2, rope=_rope(), with_cls_token=False, attn_drop=0.2),
        TOKENS,
        ((3, 3),),
    ),
    'sam': (lambda: vit_sam.Attention(16, 2), (2, 3, 4, 16), ()),
    'sam_rel_pos': (
        lambda: vit_sam.Attention(16, 2, use_rel_pos=True, input_size=(3, 4)),
        (2, 3, 4, 16),
        (),
    ),
    'sam_resized': (
        lambda: vit_sam.Attention(16, 2, use_rel_pos=True, input_size=(5, 5)),
        (2, 3, 4, 16),
        (),
    ),
    'le': (lambda: LeAttention(16, 8, 2, 2, resolution=(3, 3)), TOKENS, ()),
    'levit': (lambda: levit.Attention(16, 8, 2, 2, resolution=3), TOKENS, ()),
    'levit_subsample': (
        lambda: levit.AttentionSubsample(16, 24, 8, 2, 2, resolution=3),
        TOKENS,
        (),
    ),
    'efficientformer': (
        lambda: efficientformer.AttentionWithBias(16, 2, 8, 2, resolution=3),
        TOKENS,
        (),
    ),
    'hivit': (lambda: hivit.Attention(3, 16, 2), TOKENS, (True,)),
    'hivit_mask': (
        lambda: hivit.Attention(3, 16, 2, rpe=False),
        TOKENS,
        (None, torch.tensor([[1] * 9, [1] * 5 + [0] * 4])),
    ),
}


def _random(module: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


@pytest.mark.parametrize('recipe', ['w4a4', 'gplq_w4a4_paper'])
@pytest.mark.parametrize('case', CASES)
def test_attention_off_is_float(case: str, recipe: str) -> None:
    make, shape, extra = CASES[case]
    report = assert_identity(
        _random(make()), [torch.randn(shape)], lambda m, x: m(x[0], *extra), recipe
    )
    assert report.counts['matmul'] == (4 if case in ('sam_rel_pos', 'sam_resized') else 2)
    kept = [name for name, _ in report.kept_float]
    assert all(name.endswith('cpb_mlp') for name in kept)
    assert len(kept) == ('v2' in case)


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_classifier_off_is_float(name: str) -> None:
    size = CLASSIFIERS[name][1]
    report = assert_identity(
        classifier(name), [torch.randn(2, 3, size, size)], lambda m, x: m(x[0], mode='tensor')
    )
    assert report.counts['matmul'] == 2 * len([m for m in report.quantized['linear'] if 'qkv' in m])


def test_vit_sam_off_is_float() -> None:
    model = tiny_vit_sam()
    report = assert_identity(model, [torch.randn(1, 3, 32, 32)], lambda m, x: m(x[0]))
    assert report.counts == {'linear': 8, 'conv': 3, 'matmul': 8}


def test_strict_accepts_what_stays_float_on_purpose() -> None:
    model = classifier('swin_v2')
    report = convert_(model, dict(base='w4a4', scope='all'), strict=True)
    assert all(name.endswith('cpb_mlp') for name, _ in report.kept_float)


@pytest.mark.parametrize('case', ['mha', 'beit', 'window_v2', 'sam_rel_pos', 'rope'])
@pytest.mark.parametrize(
    'rule', [dict(role='query'), dict(role='softmax'), dict(name='qkv'), dict(role='rel_pos')]
)
def test_rules_turn_single_products_off(case: str, rule: dict) -> None:
    if rule.get('role') == 'rel_pos' and case != 'sam_rel_pos':
        rule = dict(name='proj')
    make, shape, extra = CASES[case]
    recipe = dict(base='w4a4', scope='all', rules=[dict(**rule, enabled=False)])
    full = assert_identity(_random(make()), [torch.randn(shape)], lambda m, x: m(x[0], *extra))
    part = assert_identity(
        _random(make()), [torch.randn(shape)], lambda m, x: m(x[0], *extra), recipe
    )
    assert sum(part.counts.values()) < sum(full.counts.values())


def test_roles_of_a_classifier() -> None:
    model = classifier('deit')
    rules = [
        dict(role='predictor', num_bits=5),
        dict(role='image', num_bits=6),
        dict(role='post_gelu', num_bits=7),
    ]
    convert_(model, dict(base='w4a4', scope='all', rules=rules))
    assert model.head.layers.head.weight_quantizer.spec.num_bits == 5
    assert model.head.layers.head_dist.input_quantizer.spec.num_bits == 5
    assert model.backbone.patch_embed.projection.input_quantizer.spec.num_bits == 6
    ffn = model.backbone.layers[0].ffn.layers
    assert [ffn[0][0].input_quantizer.spec.num_bits, ffn[1].input_quantizer.spec.num_bits] == [4, 7]


def test_hidden_layer_of_a_head_is_no_predictor() -> None:
    from mmpretrain.models.heads import VisionTransformerClsHead

    head = VisionTransformerClsHead(4, 16, hidden_dim=8)
    float_head = VisionTransformerClsHead(4, 16, hidden_dim=8)
    convert_(head, dict(base='w4a4', scope='all', rules=[dict(role='predictor', num_bits=5)]))
    assert head.layers.pre_logits.weight_quantizer.spec.num_bits == 4
    assert head.layers.head.weight_quantizer.spec.num_bits == 5
    assert_only_quantizer_keys(float_head, head)


def test_subclass_of_an_attention_class_is_reported() -> None:
    class MyMultiheadAttention(MultiheadAttention):
        pass

    model = nn.ModuleDict({'attn': MyMultiheadAttention(16, 2)})
    report = convert_(model, dict(base='w4a4', scope='all'))
    assert [name for name, _ in report.kept_float] == ['attn']
    with pytest.raises(ValueError, match='MyMultiheadAttention'):
        convert_(
            nn.ModuleDict({'attn': MyMultiheadAttention(16, 2)}),
            dict(base='w4a4', scope='all'),
            strict=True,
        )
