# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import copy
import itertools

import pytest
import torch
from torch import nn

from gplq_mm.ops import Engine
from gplq_mm.ops.backends import exact
from gplq_mm.ops.backends.integer import kernels, linear
from gplq_mm.ops.dispatch import explain
from tests.helpers.layers import quantized
from tests.helpers.reference import SCHEMES

pytestmark = pytest.mark.skipif(kernels.load()[0] is None, reason=kernels.load()[1])
BITS = [(4, 4), (3, 3), (2, 4), (4, 8), (8, 8)]


def layer_of(bits=(4, 4), scheme=(True, False), per_channel=False, shape=(37, 29), bias=True):
    torch.manual_seed(0)
    x = torch.randn(3, 11, shape[0]) * 2 + 0.3
    layer = quantized(nn.Linear(*shape, bias=bias), x, bits, scheme, per_channel_input=per_channel)
    layer.engine = Engine(inference='integer')
    return layer, x


@pytest.mark.parametrize('per_channel', [False, True])
@pytest.mark.parametrize(('bits', 'scheme'), list(itertools.product(BITS, SCHEMES)))
@torch.no_grad()
def test_equals_the_simulation(bits, scheme, per_channel) -> None:
    layer, x = layer_of(bits, scheme, per_channel)
    assert linear.refusal(layer, x, layer.bias) == ''
    assert torch.equal(linear.linear(layer, x, layer.bias), exact.linear(layer, x, layer.bias))


@pytest.mark.parametrize('shape', [(1, 1), (4, 16), (5, 17), (96, 33), (1031, 3), (3072, 16)])
@torch.no_grad()
def test_shapes(shape) -> None:
    layer, _ = layer_of(shape=shape, bias=False)
    for rows in (0, 1, 5, 6, 7, 50):
        x = torch.randn(rows, shape[0])
        assert torch.equal(linear.linear(layer, x, None), exact.linear(layer, x, None))
    x = torch.randn(shape[0])
    assert torch.equal(layer(x), exact.linear(layer, x, None))
    x = torch.randn(shape[0], 8).t()  # not dense
    assert torch.equal(layer(x), exact.linear(layer, x, None))


@torch.no_grad()
def test_several_threads() -> None:
    layer, _ = layer_of(shape=(128, 200))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for rows in (1, 19, 400):
            x = torch.randn(rows, 128)
            assert torch.equal(layer(x), exact.linear(layer, x, layer.bias))
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def test_infinity_is_clamped_and_nan_stays() -> None:
    layer, x = layer_of()
    x[0, 0, 0], x[0, 1, 1] = float('inf'), -float('inf')
    assert torch.equal(layer(x), exact.linear(layer, x, layer.bias))
    x[1, 2, 3] = float('nan')
    out = layer(x)
    assert out[1, 2].isnan().all() and not out[0].isnan().any()


@torch.no_grad()
def test_a_changed_weight_or_scale_is_arranged_anew() -> None:
    layer, x = layer_of()
    before = layer(x)
    layer.weight.mul_(-1)
    flipped = layer(x)
    assert torch.equal(flipped, exact.linear(layer, x, layer.bias))
    assert not torch.equal(flipped, before)
    layer.input_quantizer.scale.mul_(2)
    assert torch.equal(layer(x), exact.linear(layer, x, layer.bias))
    for scale in (0.1, 0.2, 0.3):  # a new parameter must not be taken for a freed one
        layer.input_quantizer.scale = nn.Parameter(torch.tensor(scale))
        assert torch.equal(layer(x), exact.linear(layer, x, layer.bias))
    other = copy.deepcopy(layer)
    other.weight.zero_()
    assert torch.equal(other(x), exact.linear(other, x, other.bias))
    assert torch.equal(layer(x), exact.linear(layer, x, layer.bias))


def test_reasons_to_refuse() -> None:
    layer, x = layer_of()
    with torch.no_grad():
        assert explain(layer, x, None) == 'linear: integer; not packed: gradients are disabled'
        assert 'float32 on a CPU' in linear.refusal(layer, x.double(), None)
        with torch.autocast('cpu', torch.bfloat16):
            assert 'autocast' in linear.refusal(layer, x, None)
        layer.engine = Engine()
        assert "not integer: engine.inference='simulated'" in explain(layer, x, None)
        layer.engine = Engine(inference='integer')
        layer.weight_quantizer.enabled = False
        assert 'not quantized' in linear.refusal(layer, x, None)
    assert 'not integer: gradients are enabled' in explain(layer, x, None)


@torch.no_grad()
def test_weights_and_zero_points_that_no_kernel_takes() -> None:
    layer, x = layer_of()
    layer.weight[0, 0] = float('nan')
    assert 'not finite' in linear.refusal(layer, x, None)
    layer, x = layer_of()
    layer.input_quantizer.zero_point.fill_(99)
    assert 'zero point' in linear.refusal(layer, x, None)


@torch.no_grad()
def test_shapes_that_do_not_fit_give_the_error_of_torch() -> None:
    layer, x = layer_of()
    for mistake in (x[..., :-1], torch.tensor(1.0)):
        with pytest.raises(RuntimeError):
            layer(mistake)
    with pytest.raises(RuntimeError):
        layer(x, torch.zeros(3))
