# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Whole models of mmpretrain, mmdet and mmseg on integers, equal to the simulation bit for bit."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gplq_mm.compat.torch import softmax_exponential
from gplq_mm.ops import dispatch, operations, set_engine
from gplq_mm.ops.backends.integer import kernels
from gplq_mm.ops.linear import QuantizedLayer
from tests.helpers.attentions import ATTENTIONS, randomized
from tests.helpers.backbones import BACKBONES, backbone
from tests.helpers.calibration import tensors
from tests.helpers.engines import converted
from tests.helpers.mm_models import CLASSIFIERS, DETECTORS, classifier, run_detector, vit_sam
from tests.helpers.reference import calibrated
from tests.helpers.segmentors import SEGMENTORS

pytestmark = pytest.mark.skipif(kernels.load()[0] is None, reason=kernels.load()[1])
RECIPES = ('w4a4', 'w3a3', 'w2a4', 'gplq_w4a4_paper', 'w8a8')
MODELS = {
    **{name: (lambda name=name: classifier(name)) for name in CLASSIFIERS},
    **{f'backbone {name}': (lambda name=name: backbone(name)) for name in BACKBONES},
    'vit_sam': vit_sam,
    **DETECTORS,
    **SEGMENTORS,
}


def run(model: nn.Module, x: Tensor, is_detector: bool) -> list[Tensor]:
    with torch.no_grad():
        return tensors(run_detector(model, x) if is_detector else model(x))


def finished(name: str, recipe: str) -> nn.Module:
    """Model with calibrated activations and quantized weights, in evaluation."""
    torch.manual_seed(0)
    is_detector = name in DETECTORS
    model = MODELS[name]()
    converted(model, torch.randn(4, 3, 32, 32), lambda m, x: run(m, x, is_detector), recipe)
    return finish(model)


@torch.no_grad()
def finish(model: nn.Module) -> nn.Module:
    """Quantize the weights of a calibrated model."""
    for layer in operations(model).values():
        if isinstance(layer, QuantizedLayer) and layer.weight_quantizer.enabled:
            calibrated(layer.weight_quantizer, layer.folded_weight())
    model.eval()
    return model


@pytest.fixture
def backends(monkeypatch) -> Counter[tuple[str, str]]:
    """Calls of operations by kind and backend."""
    counts: Counter[tuple[str, str]] = Counter()
    choose = dispatch.choose

    def counted(operation: Any, *inputs: Any) -> Any:
        chosen = choose(operation, *inputs)
        counts[operation.kind, chosen.backend if chosen else 'reference'] += 1
        return chosen

    monkeypatch.setattr(dispatch, 'choose', counted)
    return counts


def check_equal(name: str, recipe: str, backends: Counter[tuple[str, str]]) -> None:
    model, is_detector = finished(name, recipe), name in DETECTORS
    x = torch.randn(8, 3, 32, 32)
    expected = run(model, x, is_detector)
    backends.clear()
    set_engine(model, dict(inference='integer'))
    actual = run(model, x, is_detector)
    assert len(actual) == len(expected) > 0
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b), f'outputs differ by up to {(a - b).abs().max()}'
    assert backends['linear', 'integer'] > 0
    assert not backends['linear', 'exact'] and not backends['linear', 'reference']


@pytest.mark.parametrize('name', MODELS)
def test_four_bits(name, backends) -> None:
    check_equal(name, 'w4a4', backends)


@pytest.mark.parametrize('recipe', RECIPES)
@pytest.mark.parametrize('name', ['vit', 'swin', 'mask_rcnn'])
def test_other_recipes(name, recipe, backends) -> None:
    check_equal(name, recipe, backends)
    products = {kind for kind, backend in backends if backend == 'integer'}
    assert products >= {'linear', 'conv'} and products & {'attention', 'matmul'}


APART = {'mvit', 'mvit_rel_pos', 'mvit_resized'}
"""Attention classes whose products are computed apart: positions are added to some tokens only."""


@pytest.mark.parametrize('name', list(ATTENTIONS))
@torch.no_grad()
def test_each_attention_class(name, backends) -> None:
    make, shape, extra = ATTENTIONS[name]
    torch.manual_seed(0)
    x, model = torch.randn(shape), randomized(nn.ModuleDict({'attn': make()})).eval()
    converted(model, x, lambda m, x: m['attn'](x, *extra), 'w4a4')
    finish(model)
    expected = tensors(model['attn'](x, *extra))
    set_engine(model, dict(inference='integer'))
    backends.clear()
    actual = tensors(model['attn'](x, *extra))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    if softmax_exponential() is not None:
        assert (backends['attention', 'integer'] == 0) == (name in APART)
