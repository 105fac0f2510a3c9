# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import pytest
import torch
from torch import nn

from gplq_mm.ops import Engine
from gplq_mm.ops.backends import exact
from gplq_mm.ops.backends.integer import conv, kernels
from tests.helpers.layers import quantized

pytestmark = pytest.mark.skipif(kernels.load()[0] is None, reason=kernels.load()[1])
CONVOLUTIONS = [
    dict(kernel_size=1),
    dict(kernel_size=4, stride=4),
    dict(kernel_size=3, padding=1),
    dict(kernel_size=(3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2)),
    dict(kernel_size=3, padding='same'),
]


def layer_of(layer, bits=(4, 4), per_channel=False):
    torch.manual_seed(0)
    x = torch.randn(2, layer.in_channels, 13, 10) + 0.4
    layer = quantized(layer, x, bits, per_channel_input=per_channel)
    layer.engine = Engine(inference='integer')
    return layer, x


@pytest.mark.parametrize('bits', [(4, 4), (8, 8)])
@pytest.mark.parametrize('per_channel', [False, True])
@pytest.mark.parametrize('options', CONVOLUTIONS)
@torch.no_grad()
def test_equals_the_simulation(options, per_channel, bits) -> None:
    layer, x = layer_of(nn.Conv2d(19, 21, **options), bits, per_channel)
    assert conv.refusal(layer, x, layer.bias) == ''
    assert torch.equal(conv.conv(layer, x, layer.bias), exact.linear(layer, x, layer.bias))
    x = x.to(memory_format=torch.channels_last)
    assert torch.equal(layer(x), exact.linear(layer, x, layer.bias))


@pytest.mark.parametrize('per_channel', [False, True])
@pytest.mark.parametrize('bias', [False, True])
@torch.no_grad()
def test_transposed(bias, per_channel) -> None:
    layer, x = layer_of(nn.ConvTranspose2d(6, 5, 2, 2, bias=bias), per_channel=per_channel)
    assert conv.refusal(layer, x, layer.bias) == ''
    assert torch.equal(layer(x), exact.linear(layer, x, layer.bias))
    x[0, 0, 0, 0] = float('nan')
    out = layer(x)
    assert torch.equal(out.isnan(), exact.linear(layer, x, layer.bias).isnan())
    assert out.isnan().any() and not out.isnan().all()


@torch.no_grad()
def test_several_threads() -> None:
    layer, _ = layer_of(nn.Conv2d(16, 24, 3, padding=1))
    x, threads = torch.randn(1, 16, 40, 40), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(layer(x), exact.linear(layer, x, layer.bias))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ('layer', 'reason'),
    [
        (nn.Conv2d(4, 4, 3, groups=2), 'groups'),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode='reflect'), 'padding'),
        (nn.ConvTranspose2d(4, 4, 3, 2), 'overlap'),
    ],
)
@torch.no_grad()
def test_reasons_to_refuse(layer, reason) -> None:
    layer, x = layer_of(layer)
    assert reason in conv.refusal(layer, x, None)
    assert torch.equal(layer(x), exact.linear(layer, x, layer.bias))


@torch.no_grad()
def test_without_batch_axis_the_simulation_computes() -> None:
    layer, x = layer_of(nn.Conv2d(4, 4, 3))
    assert 'batch axis' in conv.refusal(layer, x[0], None)
    assert torch.equal(layer(x[0]), layer(x[:1])[0])


@torch.no_grad()
def test_shapes_that_do_not_fit_give_the_error_of_torch() -> None:
    layer, x = layer_of(nn.Conv2d(4, 4, 5))
    for mistake in (x[:, :3], x[..., :4]):
        with pytest.raises(RuntimeError):
            layer(mistake)
