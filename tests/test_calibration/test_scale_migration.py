# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Migration strength: what is searched, and that the search pays."""

import pytest
import torch
from torch import nn

from gplq_mm.calibration.activation_ranges import calibrate_activations
from gplq_mm.calibration.scale_migration import migrate_scale, migrated, zero_point_of
from gplq_mm.convert import convert_
from gplq_mm.quantizers import QuantSpec, dequantize, quantize


def make(layer: nn.Module, x: torch.Tensor, bits: int = 4, **activation):
    torch.manual_seed(0)
    model = nn.Sequential(layer)
    settings = {'num_bits': bits, 'granularity': 'per_channel', **activation}
    rules = [dict(role='image', num_bits=bits, activation=dict(granularity='per_channel'))]
    has_image = isinstance(layer, nn.Conv2d) and layer.in_channels == 3
    convert_(model, dict(scope='all', activation=settings, rules=rules if has_image else []))
    with torch.no_grad():
        calibrate_activations(model.eval(), lambda: model(x))
    return model[0]


def with_outliers(tokens: int = 512, channels: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, channels, generator=generator)
    x[:, 0] *= 30
    return x + torch.randn(channels, generator=generator)


def output_error(layer, x: torch.Tensor) -> float:
    with torch.no_grad():
        change = layer.input_quantizer(x) - x
        return float((change @ layer.weight.t()).square().sum())


def test_the_choice_is_no_worse_than_its_ends_on_both_sides_together():
    x = with_outliers()
    layer = make(nn.Linear(24, 16), x)
    choice = migrate_scale(layer, [x])
    assert 0 <= choice.strength <= 1
    assert choice.activation_error > 0 and choice.weight_error > 0
    chosen = output_error(layer, x)
    shared = make(nn.Linear(24, 16), x, granularity='per_tensor')
    assert chosen < 0.5 * output_error(shared, x)
    # outlier columns of the folded weight are smaller than where every channel has its range
    full = make(nn.Linear(24, 16), x)
    assert layer.input_quantizer.scale.max() / layer.input_quantizer.scale.min() <= (
        full.input_quantizer.scale.max() / full.input_quantizer.scale.min()
    )


def test_without_a_weight_error_every_channel_keeps_its_range():
    x = with_outliers()
    layer = make(nn.Linear(24, 16), x)
    before = layer.input_quantizer.scale.detach().clone()
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-7, 8, (16, 24)).float())
        layer.weight[:, 0] = 0.01  # the outlier hardly counts for the output
    choice = migrate_scale(layer, [x])
    assert choice.strength >= 0.5
    assert layer.input_quantizer.scale.shape == before.shape


@pytest.mark.parametrize('layer', [nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(6, 6, 3, groups=6)])
def test_convolutions_are_measured_on_maps(layer):
    x = torch.randn(2, 6, 9, 9, generator=torch.Generator().manual_seed(2))
    x[:, 1] *= 20
    quantized = make(layer, x)
    choice = migrate_scale(quantized, [x])
    assert choice.activation_error < 0.1
    assert quantized.input_quantizer.scale.shape == (6,)


def test_the_search_is_deterministic_and_ends_on_the_grid():
    x = with_outliers()
    first, second = (make(nn.Linear(24, 16), x) for _ in range(2))
    assert migrate_scale(first, [x]) == migrate_scale(second, [x])
    assert torch.equal(first.input_quantizer.scale, second.input_quantizer.scale)
    zero = first.input_quantizer.zero_point
    assert torch.equal(zero, zero.round()) and zero.abs().max() <= 8


@pytest.mark.parametrize('signed', [True, False])
@pytest.mark.parametrize('strength', [0.0, 0.5, 1.0])
def test_a_range_without_clipping_covers_every_channel(signed, strength):
    low, high = torch.tensor([-1.0, -0.2, 0.0]), torch.tensor([3.0, 0.1, 40.0])
    spec = QuantSpec(num_bits=4, signed=signed, symmetric=False)
    scale = migrated(high - low, strength) / 15
    zero = zero_point_of(scale, low, high, spec)
    for values in (low, high):
        error = dequantize(quantize(values, scale, zero, *spec.quant_range), scale, zero) - values
        assert (error.abs() <= scale * 1.001).all()  # half a step, and the zero point's rounding


def test_symmetric_zero_points_are_zero():
    spec = QuantSpec(num_bits=4)
    found = zero_point_of(torch.ones(2), torch.tensor([-1.0, 0.0]), torch.tensor([2.0, 3.0]), spec)
    assert torch.equal(found, torch.zeros(2))
