# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import pytest
import torch
from torch import nn

pytest.importorskip('mmpretrain')
pytest.importorskip('mmdet')

from mmengine.registry import DefaultScope
from mmpretrain.models import heads
from mmpretrain.models.backbones.xcit import XCA, ClassAttntion
from mmpretrain.models.utils import MultiheadAttention
from mmpretrain.structures import DataSample

from gplq_mm.convert import convert_, set_quantization
from tests.helpers.attentions import ATTENTIONS, randomized
from tests.helpers.identity import assert_identity, assert_only_quantizer_keys
from tests.helpers.mm_models import CLASSIFIERS, classifier
from tests.helpers.mm_models import vit_sam as tiny_vit_sam


@pytest.mark.parametrize('recipe', ['w4a4', 'gplq_w4a4_paper'])
@pytest.mark.parametrize('case', ATTENTIONS)
def test_attention_off_is_float(case: str, recipe: str) -> None:
    make, shape, extra = ATTENTIONS[case]
    report = assert_identity(
        randomized(make()), [torch.randn(shape)], lambda m, x: m(x[0], *extra), recipe
    )
    assert report.counts['matmul'] == (4 if case.endswith(('rel_pos', 'resized')) else 2)
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


@pytest.mark.parametrize(
    'case',
    ['mha', 'beit', 'window_v2', 'sam_rel_pos', 'rope', 'grouped', 'xca', 'mvit_rel_pos'],
)
@pytest.mark.parametrize(
    'rule', [dict(role='query'), dict(role='softmax'), dict(name='qkv'), dict(role='rel_pos')]
)
def test_rules_turn_single_products_off(case: str, rule: dict) -> None:
    if rule.get('role') == 'rel_pos' and not case.endswith('rel_pos'):
        rule = dict(name='proj')
    make, shape, extra = ATTENTIONS[case]
    recipe = dict(base='w4a4', scope='all', rules=[dict(**rule, enabled=False)])
    full = assert_identity(randomized(make()), [torch.randn(shape)], lambda m, x: m(x[0], *extra))
    part = assert_identity(
        randomized(make()), [torch.randn(shape)], lambda m, x: m(x[0], *extra), recipe
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


@pytest.mark.parametrize('cls', [XCA, ClassAttntion])
def test_a_name_of_another_kind_is_seen_to_be_attention(cls: type[nn.Module]) -> None:
    model = nn.ModuleDict({'attn': type(f'My{cls.__name__}', (cls,), {})(16, 2)})
    report = convert_(model, dict(base='w4a4', scope='all'))
    assert [name for name, _ in report.kept_float] == ['attn']


@pytest.mark.parametrize('name', ['LeViTClsHead', 'EfficientFormerClsHead'])
def test_a_distilled_head_trains_on_the_mean_of_its_scores(name: str) -> None:
    """mmpretrain raises NotImplementedError for them in training."""
    cls = getattr(heads, name)
    loss = dict(type='CrossEntropyLoss')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = nn.Sequential(cls(num_classes=3, in_channels=8, loss=loss))
    feats, samples = (torch.randn(4, 8),), [DataSample().set_gt_label(i % 3) for i in range(4)]
    with pytest.raises(NotImplementedError):
        model[0].train().loss(feats, samples)
    convert_(model, dict(scope='all'))
    assert isinstance(model[0], cls)
    set_quantization(model, False)
    model[0].loss(feats, samples)['loss'].backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if 'quantizer' not in n)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm1d):
            part.eval()
    assert model[0].training
    torch.testing.assert_close(model[0](feats), model.eval()[0](feats))
