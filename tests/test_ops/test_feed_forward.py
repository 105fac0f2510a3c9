# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import copy

import pytest
import torch
from torch import Tensor, nn

from gplq_mm.ops import set_engine
from gplq_mm.ops.feed_forward import MlpFeedForward, SequentialFeedForward
from tests.helpers.layers import quantized
from tests.helpers.saved import saved_bytes

RECOMPUTE = dict(type='fused', ffn='recompute')
WIDTH = 6


class Layers(SequentialFeedForward, nn.Sequential):
    pass


class FloatMlp(nn.Module):
    def __init__(self, fc1: nn.Module, act: nn.Module, fc2: nn.Module) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2, self.drop = fc1, act, fc2, nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.act(self.fc1(x))))


class Mlp(MlpFeedForward, FloatMlp):
    pass


def ffn(act: nn.Module, form: str = 'sequential', drop: float = 0.0, bias: bool = True):
    torch.manual_seed(0)
    fc1, fc2 = nn.Linear(WIDTH, 4 * WIDTH, bias=bias), nn.Linear(4 * WIDTH, WIDTH, bias=bias)
    x = torch.randn(2, 7, WIDTH)
    hidden = act(fc1(x)).detach()
    for layer, sample in ((fc1, x), (fc2, hidden)):
        quantized(layer, sample * 0.6, learn=True).weight_quantizer.reset()
    if form == 'mlp':
        return Mlp(fc1, act, fc2)
    return Layers(nn.Sequential(fc1, act, nn.Dropout(drop)), fc2, nn.Dropout(drop))


def step(module: nn.Module, engine, watch: list | None = None) -> dict[str, Tensor]:
    module = copy.deepcopy(module).train()
    set_engine(module, engine)
    if watch is not None:
        layer = module.fc1 if isinstance(module, Mlp) else module[0][0]
        layer.register_forward_hook(lambda *_: watch.append(1))
    torch.manual_seed(1)
    x = torch.randn(2, 7, WIDTH, requires_grad=True)
    out = module(x)
    out.backward(torch.randn_like(out))
    return {'out': out.detach(), 'x': x.grad, **{n: p.grad for n, p in module.named_parameters()}}


def assert_alike(expected, actual) -> None:
    assert torch.equal(expected['out'], actual['out'])
    for name in expected:
        tolerance = 0.1 if name.endswith('.scale') else 1e-5
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-3, atol=tolerance)


@pytest.mark.parametrize('form', ['sequential', 'mlp'])
@pytest.mark.parametrize(
    'act', [nn.GELU(), nn.GELU(approximate='tanh'), nn.ReLU(inplace=True), nn.SiLU()]
)
def test_recomputed_equals_reference(act, form) -> None:
    module = ffn(act, form)
    assert_alike(step(module, 'reference'), step(module, RECOMPUTE))
    assert_alike(step(module, 'fused'), step(module, RECOMPUTE))


def test_without_bias() -> None:
    module = ffn(nn.GELU(), bias=False)
    assert_alike(step(module, 'reference'), step(module, RECOMPUTE))


def test_saves_a_byte_an_input_element() -> None:
    module = ffn(nn.GELU())
    x = torch.randn(2, 7, WIDTH, requires_grad=True)
    set_engine(module, RECOMPUTE)
    assert saved_bytes(module, lambda: module(x)) == x.numel()
    set_engine(module, 'fused')
    assert saved_bytes(module, lambda: module(x)) == x.numel() + (4 + 1) * 4 * x.numel()


@pytest.mark.parametrize('act', [nn.GELU()])
def test_dropout_and_hooks_keep_the_layers(act) -> None:
    module = ffn(act, drop=0.5)
    expected, actual = step(module, 'reference'), step(module, RECOMPUTE)
    assert torch.equal(expected['out'], actual['out'])
    calls: list[int] = []
    assert_alike(step(ffn(act), 'reference'), step(ffn(act), RECOMPUTE, calls))
    assert calls == [1]


def test_evaluation_and_float_layers_are_as_ever() -> None:
    module = ffn(nn.GELU())
    set_engine(module, RECOMPUTE)
    x = torch.randn(2, 7, WIDTH)
    with torch.no_grad():
        expected = module[1](module[0](x))
        assert torch.equal(module(x), expected)
    module[1].input_quantizer.enabled = False
    hidden = module[0](x)
    assert torch.equal(module(x), module[1](hidden))
