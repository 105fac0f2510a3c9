# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Backbones with attention of their own: whole, off, at eight bits, and in a training step."""

import copy

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip('mmpretrain')
pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

from mmpretrain.models import VAN

from gplq_mm.convert import convert_
from tests.helpers.all_backbones import BACKBONES, backbone
from tests.helpers.engines import assert_engines_agree, converted
from tests.helpers.identity import assert_identity
from tests.helpers.mm_models import calibrate_activations, calibrate_weights, tensors
from tests.helpers.segmentors import PRODUCTS as OF_MMSEG

PRODUCTS = {
    'twins_pcpvt': 2 * 3,
    'twins_svt': 2 * 3,
    'davit': 2 * 4,
    'mixmim': 2 * 2,
    'xcit': 2 * 3,
    'edgenext': 2 * 3,
    'mvit': 4 * 3,
    **OF_MMSEG,
}
"""Name -> matrix products of its attentions."""


def images(name: str) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 3, BACKBONES[name][1], BACKBONES[name][1])


def run(model: nn.Module, x: Tensor) -> object:
    return model(x)


@pytest.mark.parametrize('name', BACKBONES)
def test_off_is_float_and_nothing_stays_float(name: str) -> None:
    report = assert_identity(backbone(name), [images(name)], lambda m, x: m(x[0]))
    assert report.counts['matmul'] == PRODUCTS[name]
    assert report.kept_float == []


@pytest.mark.parametrize('name', BACKBONES)
def test_eight_bits_are_close(name: str) -> None:
    model, x = backbone(name), images(name)
    quantized = copy.deepcopy(model)
    convert_(quantized, dict(base='w8a8', scope='all'), strict=True)
    calibrate_activations(quantized, lambda: quantized(x))
    calibrate_weights(quantized)
    with torch.no_grad():
        pairs = zip(tensors(quantized(x)), tensors(model(x)), strict=True)
        for actual, expected in pairs:
            assert 0 < (actual - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize('name', BACKBONES)
def test_it_trains_alike_with_both_engines(name: str) -> None:
    x = images(name)
    assert_engines_agree(converted(backbone(name), x, run), x, run)


def test_a_gate_of_convolutions_is_no_unknown_attention() -> None:
    arch = dict(embed_dims=[8, 8, 8, 8], depths=[1, 1, 1, 1], ffn_ratios=[2, 2, 2, 2])
    report = convert_(VAN(arch=arch), dict(base='w4a4', scope='all'), strict=True)
    assert report.kept_float == [] and report.counts['matmul'] == 0
    assert report.counts['conv'] > 4 * 7
