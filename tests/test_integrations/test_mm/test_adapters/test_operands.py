# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""No product escapes: looked at from below, every operand is on its grid."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip('mmdet')
pytest.importorskip('mmpretrain')
pytest.importorskip('mmseg')

from mmdet.models.layers.transformer import DetrTransformerDecoderLayer

from gplq_mm.convert import convert_
from gplq_mm.quantizers import PerChannel, PerRow
from tests.helpers import attentions, segmentors
from tests.helpers.attentions import randomized
from tests.helpers.backbones import BACKBONES, backbone
from tests.helpers.mm_models import (
    CLASSIFIERS,
    DETECTORS,
    calibrate_activations,
    calibrate_weights,
    classifier,
    run_detector,
    vit_sam,
)
from tests.helpers.products import (
    ExecutedProduct,
    Recorder,
    is_allowed,
    is_integer,
    is_on_grid,
    record_products,
)

OF_MMSEG = {n: segmentors.ATTENTIONS[n] for n in segmentors.IN_NO_SEGMENTOR}
ATTENTIONS = {**attentions.ATTENTIONS, **OF_MMSEG}
BITS = 4
ALLOWED = {'*.cpb_mlp.*': 'acts on a constant table: a deployed model stores its output'}
CHANNEL_AXIS = {'convolution': 1, 'bmm': 0, 'baddbmm': 0}
"""Of a map's channels and of the heads."""
RECIPES = ['w4a4', 'w4a4_v1', 'gplq_w4a4_paper']
"""Scales a vector and logarithmic probabilities; a tensor; a head."""


def _detr_layer() -> nn.Module:
    attention = dict(embed_dims=16, num_heads=2, batch_first=True)
    ffn = dict(embed_dims=16, feedforward_channels=32)
    torch.manual_seed(0)
    layer = DetrTransformerDecoderLayer(
        self_attn_cfg=attention, cross_attn_cfg=attention, ffn_cfg=ffn
    )
    return layer.eval()


def _run_detr_layer(model: nn.Module, x: Tensor) -> Tensor:
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    query, memory = x[:, :3], x[:, 3:]
    return model(query, memory, memory, query_pos=query, key_padding_mask=padding)


def _attention(name: str) -> 'Case':
    """One attention module alone: also the classes that no model above contains."""
    make, shape, extra = ATTENTIONS[name]
    return lambda: randomized(nn.ModuleDict({'attn': make()})).eval(), _run_with(extra), shape


def _run_with(extra: tuple[Any, ...]) -> Callable[[nn.Module, Tensor], Any]:
    return lambda m, x: m['attn'](x, *extra)


Case = tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Any], tuple[int, ...]]
CASES: dict[str, Case] = {
    **{
        name: (
            lambda name=name: classifier(name),
            lambda m, x: m(x, mode='tensor'),
            (2, 3, size, size),
        )
        for name, (_, size) in CLASSIFIERS.items()
    },
    'vit_sam': (vit_sam, lambda m, x: m(x), (2, 3, 32, 32)),
    **{
        name: (lambda name=name: backbone(name), lambda m, x: m(x), (2, 3, size, size))
        for name, (_, size) in BACKBONES.items()
    },
    'vit_sam_larger': (vit_sam, lambda m, x: m(x), (1, 3, 40, 36)),
    'detr_layer': (_detr_layer, _run_detr_layer, (2, 8, 16)),
    **{name: (make, run_detector, (1, 3, 40, 56)) for name, make in DETECTORS.items()},
    **{
        name: (make, lambda m, x: m(x, mode='tensor'), (2, 3, 32, 32))
        for name, make in segmentors.SEGMENTORS.items()
    },
    **{f'attention {name}': _attention(name) for name in ATTENTIONS},
}

PAIRS = [
    (case, recipe)
    for case in CASES
    for recipe in RECIPES
    if recipe == RECIPES[0] or case.removeprefix('attention ') not in segmentors.ALL_NAMES
]


@cache
def calibrated(case: str, recipe: str) -> tuple[nn.Module, Tensor, int]:
    """Stage-1 model, its input, and the number of quantized operations."""
    make, run, shape = CASES[case]
    torch.manual_seed(4)
    x = torch.randn(shape)
    model = make()
    rules = [dict(name='*', num_bits=BITS)]  # one width, so that every bound is tight
    report = convert_(model, dict(base=recipe, scope='all', rules=rules))
    calibrate_activations(model, lambda: run(model, x))
    return model, x, sum(report.counts.values())


def record(model: nn.Module, case: str, x: Tensor) -> Recorder:
    with record_products(model) as recorder:
        CASES[case][1](model, x)
    assert not recorder.forbidden
    return recorder


def escaped(
    products: list[ExecutedProduct], is_fine: Callable[[ExecutedProduct], bool]
) -> list[str]:
    found = [p for p in products if not is_allowed(p, ALLOWED) and not is_fine(p)]
    return [f'{p.operator} in {p.module} of {tuple(p.lhs.shape)}' for p in found]


def operand_quantizers(model: nn.Module, product: ExecutedProduct) -> tuple[Any, Any]:
    """Quantizers of the two operands of a product."""
    module: Any = model.get_submodule(product.module)
    if hasattr(module, 'rhs_quantizer'):
        return module.lhs_quantizer, module.rhs_quantizer
    return module.input_quantizer, module.weight_quantizer


def where_scales_are(product: ExecutedProduct, side: str, quantizer: Any) -> dict[str, Any]:
    """Arguments of `is_on_grid` for an operand: which of its values share a scale."""
    granularity = quantizer.spec.granularity
    if isinstance(granularity, PerRow):  # along the summed axis, however the batch was flattened
        return dict(axis=-1 if side == 'lhs' else -2, vectors=True)
    if quantizer.kind == 'weight' or not isinstance(granularity, PerChannel):
        return {}
    if granularity.axis == -1:  # of tokens, whichever operator a linear layer becomes
        return dict(axis=-1)
    return dict(axis=CHANNEL_AXIS[product.operator])


def are_codes(model: nn.Module, product: ExecutedProduct) -> bool:
    """Whether both operands are integers of their widths, or levels of their tables."""
    for side, q in zip(('lhs', 'rhs'), operand_quantizers(model, product), strict=True):
        x = getattr(product, side)
        if q.spec.is_log:
            if not torch.isin(x, q.levels.to(x.dtype)).all():
                return False
        elif not is_integer(x, BITS, **where_scales_are(product, side, q)):
            return False
    return True


def has_activations_on_grids(model: nn.Module, product: ExecutedProduct) -> bool:
    """Whether the activations among the operands have few enough values a scale."""
    per_head = isinstance(
        operand_quantizers(model, product)[0].spec.granularity, PerChannel
    ) and hasattr(model.get_submodule(product.module), 'rhs_quantizer')
    if per_head and product.module.endswith(('rel_h_matmul', 'rel_w_matmul')):
        # the einsum puts the rows of the two heads, each on its own grid, into one matrix
        return is_on_grid(product.lhs, BITS + 1) and is_on_grid(product.rhs, BITS)
    return all(
        is_on_grid(getattr(product, side), BITS, **where_scales_are(product, side, q))
        for side, q in zip(('lhs', 'rhs'), operand_quantizers(model, product), strict=True)
        if q.kind == 'activation'
    )


@pytest.mark.parametrize(('case', 'recipe'), PAIRS)
def test_all_products_multiply_integers(case: str, recipe: str) -> None:
    model, x, operations = calibrated(case, recipe)
    model = copy.deepcopy(model)
    calibrate_weights(model)
    with torch.no_grad():
        products = record(model, case, x).products
    assert not escaped(products, lambda p: are_codes(model, p))
    assert len([p for p in products if not is_allowed(p, ALLOWED)]) >= operations


@pytest.mark.parametrize(('case', 'recipe'), PAIRS)
def test_stage_1_activations_are_on_the_grid(case: str, recipe: str) -> None:
    model, x, _ = calibrated(case, recipe)
    with torch.enable_grad():  # as in training: values, not codes
        products = record(model, case, x).products
    assert not escaped(products, lambda p: has_activations_on_grids(model, p))
    with torch.no_grad():
        products = record(model, case, x).products
    assert not escaped(products, lambda p: has_activations_on_grids(model, p))


@pytest.mark.parametrize('case', ['vit', 'swin_v2', 'vit_sam', 'detr_layer'])
def test_codes_and_values_agree(case: str) -> None:
    model, x, _ = calibrated(case, 'gplq_w4a4_paper')
    model = copy.deepcopy(model)
    calibrate_weights(model)
    run = CASES[case][1]
    with torch.no_grad():
        codes = run(model, x)
    with torch.enable_grad():
        values = run(model, x)
    codes, values = (y[0] if isinstance(y, tuple) else y for y in (codes, values))
    error = (codes - values).abs()  # a code may flip where rounding differs
    assert error.mean() < 0.05 * values.abs().mean()


@pytest.mark.parametrize('case', ['vit', 'mask_rcnn'])
def test_the_float_model_would_fail(case: str) -> None:
    make, run, shape = CASES[case]
    model = make()
    with record_products(model) as recorder, torch.no_grad():
        run(model, torch.randn(shape))
    bad = escaped(recorder.products, lambda p: is_on_grid(p.lhs, BITS))
    assert len(bad) == len(recorder.products) > 0
    assert bool(recorder.forbidden) == (case == 'vit')
