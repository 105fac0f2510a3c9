# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import numpy as np
import pytest
import torch
from torch import nn

from gplq_mm.calibration.float_weights import copy_weights
from gplq_mm.convert import convert_, quantized_layers, quantizers
from gplq_mm.ops import QuantConv2d, QuantConvTranspose2d, QuantLinear, weight_rows
from gplq_mm.ptq import (
    WEIGHT_PTQ,
    PTQTask,
    WeightPTQ,
    build_weight_ptq,
    register_weight_ptq,
    write_codes,
)
from gplq_mm.ptq.ranges.percentile import sorted_quantile

SHAPES = {
    'linear': lambda: nn.Linear(12, 5),
    'one_element': lambda: nn.Linear(1, 3),
    'conv': lambda: nn.Conv2d(4, 6, 3),
    'grouped_conv': lambda: nn.Conv2d(4, 6, 3, groups=2),
    'transposed': lambda: nn.ConvTranspose2d(4, 6, 2),
    'grouped_transposed': lambda: nn.ConvTranspose2d(4, 6, 2, groups=2),
}


def make(layer, bits=4, activation='per_tensor', weight=None):
    """A converted one-layer model with input scales from 1e-3 to 10."""
    model = nn.Sequential(layer)
    recipe = dict(
        scope='all',
        activation=dict(granularity=activation),
        weight=dict(num_bits=bits, **(weight or {})),
    )
    convert_(model, recipe)
    for quantizer in quantizers(model, 'activation').values():
        scale = 10 ** (torch.rand(quantizer.scale.shape) * 4 - 3)
        quantizer.set_qparams(scale, torch.zeros_like(scale))
    return model


def apply(model, config):
    """Run the algorithms; returns the layer and its float rows."""
    layers = quantized_layers(model)
    weights = copy_weights(layers)
    name, layer = next(iter(layers.items()))
    rows = weight_rows(layer, weights[name]).detach().clone()
    for algorithm in build_weight_ptq(config):
        algorithm.apply(PTQTask(model, layers, weights))
    return layer, rows


def error(rows, scale, qmin, qmax):
    """Squared error a row of symmetric rounding, in numpy."""
    rows, scale = rows.double().numpy(), scale[:, None]
    codes = np.clip(np.rint(rows / scale), qmin, qmax)
    return ((codes * scale - rows) ** 2).sum(1)


@pytest.mark.parametrize('activation', ['per_tensor', 'per_channel'])
@pytest.mark.parametrize('bits', range(2, 9))
@pytest.mark.parametrize('shape', SHAPES)
def test_written_weight_gives_the_same_codes_again(shape, bits, activation):
    torch.manual_seed(bits)
    layer, rows = apply(make(SHAPES[shape](), bits, activation), 'mse')
    quantizer = layer.weight_quantizer
    codes, scale = quantizer.codes(layer.folded_weight())
    again, _ = quantizer.codes(layer.folded_weight(layer.unfolded_weight(codes * scale)))
    assert torch.equal(codes, again)
    assert codes.min() >= quantizer.spec.quant_range[0]
    assert codes.max() <= quantizer.spec.quant_range[1]
    if activation == 'per_tensor':  # nothing to unfold: the values themselves are fixed points
        assert torch.equal(quantizer(layer.weight), layer.weight)
    # and they are the nearest codes of the float weight
    expected = np.clip(
        np.rint(rows.numpy() / quantizer.scale.numpy()[:, None]), *quantizer.spec.quant_range
    )
    axis = layer.weight_axis
    np.testing.assert_array_equal(codes.movedim(axis, 0).flatten(1).detach().numpy(), expected)


@pytest.mark.parametrize('symmetric', [True, False])
def test_per_tensor_and_asymmetric_weights_are_on_their_grid(symmetric):
    spec = dict(granularity='per_tensor', symmetric=symmetric)
    layer, rows = apply(make(nn.Linear(9, 4), weight=spec), 'mse')
    assert layer.weight_quantizer.scale.shape == ()
    assert torch.equal(layer.weight_quantizer(layer.weight), layer.weight)
    step = layer.weight_quantizer.scale
    assert (layer.weight - rows.view_as(layer.weight)).abs().max() < 4 * step


def test_minmax_covers_every_row():
    layer, rows = apply(make(nn.Linear(12, 5)), 'minmax')
    expected = np.maximum(rows.numpy().max(1) / 7, rows.numpy().min(1) / -8)
    np.testing.assert_allclose(layer.weight_quantizer.scale.numpy(), expected, rtol=1e-6)
    assert ((layer.weight - rows).abs() <= layer.weight_quantizer.scale[:, None] * 0.5001).all()


def test_percentile_takes_the_best_of_the_grid():
    torch.manual_seed(0)
    linear = nn.Linear(400, 6)
    with torch.no_grad():
        linear.weight[:3, 0] = 4.0  # outliers that are worth clipping, or not
    grid = [0.9, 0.99, 1.0]
    layer, rows = apply(make(linear), dict(type='percentile', grid=grid))
    candidates = []
    for p in grid:
        hi, lo = (np.quantile(rows.numpy(), q, axis=1) for q in (p, 1 - p))
        candidates.append(np.maximum(np.maximum(hi, 0) / 7, np.minimum(lo, 0) / -8))
    errors = np.stack([error(rows, scale, -8, 7) for scale in candidates])
    best = np.stack(candidates)[errors.argmin(0), np.arange(6)]
    assert len(set(errors.argmin(0))) > 1
    np.testing.assert_allclose(layer.weight_quantizer.scale.numpy(), best, rtol=1e-5)


@pytest.mark.parametrize('q', [0.0, 0.001, 0.37, 0.9999, 1.0])
@pytest.mark.parametrize('elements', [1, 2, 97])
def test_sorted_quantile_is_numpys(elements, q):
    rows = torch.randn(3, elements).sort(1).values
    expected = np.quantile(rows.numpy(), q, axis=1)
    np.testing.assert_allclose(sorted_quantile(rows, q).numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
def test_mse_is_as_good_as_brute_force(bits):
    torch.manual_seed(0)
    linear = nn.Linear(64, 6)
    nn.init.normal_(linear.weight)
    layer, rows = apply(make(linear, bits), 'mse')
    qmin, qmax = layer.weight_quantizer.spec.quant_range
    top = np.abs(rows.numpy()).max(1) / qmax
    brute = np.min([error(rows, top * f, qmin, qmax) for f in np.linspace(0.05, 1, 800)], 0)
    found = error(rows, layer.weight_quantizer.scale.double().numpy(), qmin, qmax)
    minmax, _ = apply(make(linear_like(rows), bits), 'minmax')
    plain = error(rows, minmax.weight_quantizer.scale.double().numpy(), qmin, qmax)
    assert (found <= plain * (1 + 1e-6)).all()
    slack = 1.05 if bits < 8 else 1.25  # 80 steps against 800
    assert (found <= brute * slack).all()


def linear_like(rows):
    linear = nn.Linear(rows.shape[1], rows.shape[0])
    with torch.no_grad():
        linear.weight.copy_(rows)
    return linear


@pytest.mark.parametrize('name', ['minmax', 'percentile', 'mse'])
def test_zero_rows_get_scale_1_and_code_0(name):
    linear = nn.Linear(8, 3)
    with torch.no_grad():
        linear.weight[1] = 0
    layer, _ = apply(make(linear), name)
    assert layer.weight_quantizer.scale[1] == 1
    assert layer.weight[1].eq(0).all()
    assert layer.weight.isfinite().all()


@pytest.mark.parametrize('name', ['minmax', 'percentile', 'mse'])
def test_same_weights_give_the_same_bits(name):
    torch.manual_seed(3)
    weight = torch.randn(5, 12)
    layers = [apply(make(linear_like(weight)), name)[0] for _ in range(2)]
    assert torch.equal(layers[0].weight, layers[1].weight)
    assert torch.equal(layers[0].weight_quantizer.scale, layers[1].weight_quantizer.scale)


def test_combination_runs_in_order_from_the_float_weights():
    seen = []

    @register_weight_ptq('test_only')
    class Second(WeightPTQ):
        needs_data = True

        def apply(self, task):
            for name, layer in task.layers.items():
                seen.append(layer.weight_quantizer.is_calibrated)
                assert not torch.equal(layer.weight, task.float_weights[name])
                codes, _ = layer.weight_quantizer.codes(layer.folded_weight())
                write_codes(layer, (codes + 1).clamp_max(7))

    try:
        layer, rows = apply(make(nn.Linear(6, 3)), ['minmax', dict(type='test_only')])
    finally:
        del WEIGHT_PTQ['test_only']
    nearest = torch.round(rows / layer.weight_quantizer.scale[:, None])
    codes, _ = layer.weight_quantizer.codes(layer.folded_weight())
    assert seen == [True]
    assert torch.equal(codes, (nearest + 1).clamp_max(7))


def test_codes_outside_the_range_are_refused():
    layer, _ = apply(make(nn.Linear(6, 3)), 'minmax')
    with pytest.raises(ValueError, match=r'0\.weight_quantizer: .*4-bit codes'):
        write_codes(layer, torch.full((3, 6), 9.0))


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        ('mze', r"'mze' is unknown; write one of \[.*'minmax'.*\].*'mse'"),
        (dict(type='mse', step=3), r"'mse' does not take the options .*step"),
        ([], 'empty'),
        (dict(type='mse', steps=1), 'at least 2'),
        (dict(type='percentile', grid=[99.9]), r'\(0\.5, 1\]'),
    ],
)
def test_wrong_configs_name_what_to_write(config, message):
    with pytest.raises(ValueError, match=message):
        build_weight_ptq(config)


def test_shapes_cover_every_layer_class():
    classes = {type(make(make_layer())[0]) for make_layer in SHAPES.values()}
    assert classes == {QuantLinear, QuantConv2d, QuantConvTranspose2d}
