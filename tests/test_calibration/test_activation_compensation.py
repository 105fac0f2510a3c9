# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Weights fitted to quantized inputs: better on unseen images, or left alone."""

import pytest
import torch
from torch import nn

from gplq_mm.calibration.activation_compensation import compensate
from gplq_mm.calibration.activation_ranges import calibrate_activations
from gplq_mm.convert import convert_


def correlated(images: int, tokens: int = 64, seed: int = 1) -> list[torch.Tensor]:
    """Inputs of four degrees of freedom in 16 channels."""
    basis = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, 4, generator=generator) @ basis + 0.5 for _ in range(images)]


def layer_on(inputs, bias: bool = True, bits: int = 3):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(16, 8, bias=bias))
    convert_(model, dict(scope='all', activation=dict(num_bits=bits), rules=[]))
    with torch.no_grad():
        calibrate_activations(model.eval(), lambda: [model(x) for x in inputs])
    return model[0]


def error(layer, weight, bias, x) -> float:
    with torch.no_grad():
        float_out = x @ weight.t() + (0 if bias is None else bias)
        return float((layer(x) - float_out).square().mean())


@pytest.mark.parametrize('bias', [True, False])
def test_correlated_inputs_average_rounding_out(bias):
    inputs, unseen = correlated(16), torch.cat(correlated(4, seed=9))
    layer = layer_on(inputs, bias)
    weight = layer.weight.detach().clone()
    offset = layer.bias.detach().clone() if bias else None
    before = error(layer, weight, offset, unseen)
    found = compensate(layer, inputs, inputs)
    assert found.damping is not None
    assert found.error_after < 0.7 * found.error_before
    assert error(layer, weight, offset, unseen) < 0.7 * before


def test_errors_of_the_layers_before_are_made_up_for():
    """Inputs that are shrunk by a tenth: the weights grow by it."""
    floats = correlated(16)
    inputs = [0.9 * x for x in floats]
    layer = layer_on(inputs, bits=8)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    compensate(layer, inputs, floats)
    with torch.no_grad():
        wanted = floats[0] @ weight.t() + bias
        assert (layer(inputs[0]) - wanted).square().mean() < 0.01 * wanted.var()


def test_a_fit_that_does_not_hold_on_other_images_is_left_out():
    generator = torch.Generator().manual_seed(5)
    inputs = [torch.randn(2, 16, generator=generator) for _ in range(8)]  # 12 tokens for 16 columns
    noise = [x + torch.randn(2, 16, generator=generator) for x in inputs]
    layer = layer_on(inputs)
    weight = layer.weight.detach().clone()
    found = compensate(layer, inputs, noise)
    if found.damping is None:
        assert torch.equal(layer.weight, weight)
        assert found.error_after == found.error_before
    else:
        assert found.error_after < found.error_before


def test_too_few_images_to_hold_one_out_change_nothing():
    inputs = correlated(3)
    layer = layer_on(inputs)
    weight = layer.weight.detach().clone()
    assert compensate(layer, inputs, inputs).damping is None
    assert torch.equal(layer.weight, weight)
