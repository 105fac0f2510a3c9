# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gplq_mm.ops import QuantLinear, swap_class, weight_rows
from gplq_mm.ops.backends.exact import accumulator_dtype
from gplq_mm.quantizers import UncalibratedError
from tests.helpers.layers import quantized, set_enabled, step
from tests.helpers.reference import SCHEMES, centred, rescale

SHAPES = [(1, 1), (3, 1), (2, 7), (1, 5, 3), (0, 4), ()]


def reference(layer, x):
    """int64 sums of codes, one real factor an output channel, bias in float32."""
    total = (
        centred(layer.input_quantizer, x) @ centred(layer.weight_quantizer, layer.folded_weight()).T
    )
    factor = layer.weight_quantizer.scale
    if not layer.folds_input_scale:
        factor = factor * layer.input_quantizer.scale
    bias = None if layer.bias is None else layer.bias.detach().numpy()
    return rescale(np.asarray(total), factor.detach().numpy(), bias)


@given(
    bits=st.tuples(st.integers(2, 8), st.integers(2, 8)),
    scheme=st.sampled_from(SCHEMES),
    per_channel=st.tuples(st.booleans(), st.booleans()),
    bias=st.booleans(),
    learn=st.booleans(),
    shape=st.sampled_from(SHAPES),
    sizes=st.sampled_from([(13, 7), (1, 5), (31, 1)]),
    seed=st.integers(0, 10**6),
)
def test_inference_is_the_integer_reference_bit_for_bit(
    bits, scheme, per_channel, bias, learn, shape, sizes, seed
):
    torch.manual_seed(seed)
    spread = torch.rand(sizes[0]) * 5
    layer = nn.Linear(*sizes, bias=bias)
    layer = quantized(layer, torch.randn(40, sizes[0]) * spread, bits, scheme, *per_channel, learn)
    x = torch.randn(*shape, sizes[0]) * spread * 1.3
    with torch.no_grad():
        integer = layer(x)
        assert torch.equal(integer, reference(layer, x))
    values = layer(x).detach()
    assert values.shape == integer.shape
    assert torch.allclose(values, integer, rtol=1e-5, atol=1e-5 * float(spread.max()))


def test_deep_sums_of_wide_codes_stay_exact():
    depth = 1543  # 255 * 128 * 1543 > 2^24
    x = torch.rand(3, depth) + 0.5
    layer = nn.Linear(depth, 5)
    nn.init.uniform_(layer.weight, 0.9, 1.0)
    layer = quantized(layer, x, (8, 8), (False, True))
    quantizers = layer.input_quantizer, layer.weight_quantizer
    assert accumulator_dtype(*quantizers, layer.product_depth()) == torch.float64
    total = centred(quantizers[0], x) @ centred(quantizers[1], layer.weight).T
    assert (total > 2**24).all() and (total % 2 == 1).any()  # float32 cannot hold these
    with torch.no_grad():
        assert torch.equal(layer(x), reference(layer, x))


@pytest.mark.parametrize('per_channel', [False, True])
@pytest.mark.parametrize('learn', [False, True])
def test_switched_off_it_is_the_float_layer_bit_for_bit(per_channel, learn):
    x = torch.randn(3, 5, 7)
    layer = nn.Linear(7, 11)
    twin = copy.deepcopy(layer)
    layer = quantized(layer, x, per_channel_input=per_channel, learn=learn)
    set_enabled(layer, False)
    assert all(map(torch.equal, step(layer, x), step(twin, x)))
    with torch.no_grad():
        assert torch.equal(layer(x), twin(x))


def test_before_stage_two_only_the_input_is_quantized():
    x = torch.randn(4, 6)
    layer = quantized(nn.Linear(6, 3), x)
    layer.weight_quantizer.reset()
    expected = nn.functional.linear(layer.input_quantizer(x), layer.weight, layer.bias)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    assert layer.effective_weight() is layer.weight


@pytest.mark.parametrize('per_channel', [False, True])
def test_weights_written_on_the_grid_stay_there(per_channel):
    x = torch.randn(20, 6) * torch.tensor([0.01, 0.1, 1, 3, 10, 100])
    layer = quantized(nn.Linear(6, 3), x, per_channel_input=per_channel)
    with torch.no_grad():
        codes = layer.weight_quantizer.codes(layer.folded_weight())[0]
        before = layer(x)
        layer.weight.copy_(layer.effective_weight())
        assert torch.equal(layer.weight_quantizer.codes(layer.folded_weight())[0], codes)
        assert torch.equal(layer(x), before)


def test_folding_and_unfolding():
    x = torch.randn(20, 6) * torch.arange(1.0, 7)
    layer = quantized(nn.Linear(6, 3), x, per_channel_input=True)
    folded = layer.folded_weight()
    assert torch.equal(folded, layer.weight * layer.input_quantizer.scale)
    assert torch.allclose(layer.unfolded_weight(folded), layer.weight)
    assert torch.equal(weight_rows(layer), folded) and not weight_rows(layer).requires_grad


def test_a_per_channel_input_scale_below_its_bound_is_alike_on_both_paths():
    x = torch.randn(4, 6)
    layer = quantized(nn.Linear(6, 3), x, per_channel_input=True, learn=True)
    with torch.no_grad():
        layer.input_quantizer.scale[2] = -0.5
        integer = layer(x)
    assert torch.allclose(layer(x), integer, atol=1e-5)


def test_gradients_reach_weight_input_and_scale():
    x = torch.randn(4, 6, requires_grad=True)
    layer = quantized(nn.Linear(6, 3), x, learn=True)
    layer.weight_quantizer.reset()
    layer(x).square().sum().backward()
    for tensor in (x, layer.weight, layer.bias, layer.input_quantizer.scale):
        assert tensor.grad is not None and tensor.grad.abs().sum() > 0


def test_non_contiguous_input_and_another_bias():
    x = torch.randn(6, 4)
    layer = quantized(nn.Linear(6, 3), x.t())
    with torch.no_grad():
        assert torch.equal(layer(x.t()), layer(x.t().contiguous()))
        assert torch.allclose(layer.linear(x.t(), layer.bias + 1), layer(x.t()) + 1, atol=1e-6)


@pytest.mark.parametrize('per_channel', [False, True])
def test_bfloat16_model_and_autocast(per_channel):
    x = torch.randn(8, 6)
    layer = quantized(nn.Linear(6, 3), x, (8, 8), per_channel_input=per_channel)
    with torch.no_grad():
        full = layer(x)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            mixed = layer(x)
        half = layer.bfloat16()(x.bfloat16())
    trained = layer(x.bfloat16())
    for y in (mixed, half, trained):
        assert y.dtype == torch.bfloat16
        assert torch.allclose(y.float(), full, atol=0.05, rtol=0.05)


def test_an_uncalibrated_input_is_an_error():
    layer = quantized(nn.Linear(6, 3), torch.randn(4, 6))
    layer.input_quantizer.reset()
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(UncalibratedError):
            layer(torch.randn(4, 6))


def test_swapping_keeps_keys_and_isinstance():
    float_layer = nn.Linear(6, 3)
    keys, weight = list(float_layer.state_dict()), float_layer.weight
    layer = quantized(float_layer, torch.randn(4, 6))
    assert layer is float_layer and isinstance(layer, nn.Linear) and isinstance(layer, QuantLinear)
    assert layer.weight is weight and list(layer.state_dict())[: len(keys)] == keys
    assert all('_quantizer.' in key for key in list(layer.state_dict())[len(keys) :])


def test_swapping_to_a_stranger_is_refused():
    with pytest.raises(TypeError, match='QuantLinear does not extend Conv2d'):
        swap_class(nn.Conv2d(1, 1, 1), QuantLinear)
