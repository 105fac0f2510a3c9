# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Every multiply-accumulate of a fully quantized model is counted as a quantized one."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip('mmdet')
pytest.importorskip('mmpretrain')

from gplq_mm.analysis.cost import bit_operations, count_macs, model_bytes
from gplq_mm.convert import convert_
from tests.helpers.mm_models import (
    CLASSIFIERS,
    calibrate_activations,
    calibrate_weights,
    classifier,
    vit_sam,
)

MODELS = {**{name: lambda name=name: classifier(name) for name in CLASSIFIERS}, 'vit_sam': vit_sam}


@pytest.mark.parametrize('name', [name for name in MODELS if name != 'swin_v2'])
def test_all_macs_are_quantized(name: str) -> None:
    model, x = MODELS[name](), torch.randn(1, 3, 32, 32)
    convert_(model, dict(base='w4a4', scope='all', rules=[dict(name='*', num_bits=4)]))
    calibrate_activations(model, lambda: model(x))
    calibrate_weights(model)
    count = count_macs(model, lambda: model(x))
    assert count.total == sum(count.layers.values()) > 0
    assert bit_operations(model, count) == 16 * count.total


def test_bytes_of_a_packed_input_projection() -> None:
    model = nn.ModuleDict({'attn': nn.MultiheadAttention(32, 2, bias=False, batch_first=True)})
    x = torch.randn(1, 4, 32)
    float_bytes = model_bytes(model)
    assert float_bytes == 4 * 32 * 32 * 4
    quantized = copy.deepcopy(model)
    convert_(quantized, dict(base='w4a4', scope='all'))
    calibrate_activations(quantized, lambda: quantized['attn'](x, x, x))
    calibrate_weights(quantized)
    activation_scales = (4 * 32 + 4) * 5  # a channel of each projection, an operand
    assert model_bytes(quantized) == 4 * 32 * 32 // 2 + 4 * 32 * 4 + activation_scales
