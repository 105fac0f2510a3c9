# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gplq_mm.ops import set_engine
from gplq_mm.quantizers.packing.codes import RESIDUAL_ERROR
from tests.helpers.layers import quantized
from tests.helpers.saved import saved_bytes

LAYERS = {
    'linear': (lambda: nn.Linear(13, 7), (5, 11, 13)),
    'linear_no_bias': (lambda: nn.Linear(13, 7, bias=False), (3, 13)),
    'linear_vector': (lambda: nn.Linear(13, 7), (13,)),
    'linear_one_token': (lambda: nn.Linear(13, 1), (1, 1, 13)),
    'linear_empty': (lambda: nn.Linear(13, 7), (0, 11, 13)),
    'conv': (lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1), (2, 6, 9, 7)),
    'conv_groups': (lambda: nn.Conv2d(6, 4, (3, 1), groups=2, dilation=2), (2, 6, 11, 7)),
    'conv_depthwise': (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), (2, 6, 5, 7)),
    'conv_same': (lambda: nn.Conv2d(6, 4, 3, padding='same'), (2, 6, 9, 7)),
    'conv_reflect': (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode='reflect'), (2, 6, 9, 7)),
    'conv_empty': (lambda: nn.Conv2d(6, 4, 3), (0, 6, 9, 7)),
    'transposed': (
        lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1),
        (2, 6, 5, 7),
    ),
    'transposed_groups': (lambda: nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2), (2, 6, 5, 7)),
}


def layer_and_input(name: str, bits: int = 4, learn: bool = True, **options) -> tuple:
    """Layer in stage 1 (its weight is float) whose range leaves a part of the input out."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    x = torch.randn(shape)
    sample = x if x.numel() else torch.randn(2, *shape[1:])
    scheme = options.pop('scheme', (True, False))
    layer = quantized(make(), sample * 0.5, (4, bits), scheme, learn=learn, **options)
    layer.weight_quantizer.reset()
    return layer, x


def step(layer: nn.Module, x: Tensor, engine: str, run=None) -> dict[str, Tensor]:
    layer = copy.deepcopy(layer)
    set_engine(layer, engine)
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = layer(x) if run is None else run(layer, x)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(grad.to(out.dtype))
    grads = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
    return {'out': out.detach(), 'x': x.grad, **grads}


def assert_alike(expected, actual, tolerance: float = 1e-4) -> None:
    assert torch.equal(expected['out'], actual['out'])
    assert expected.keys() == actual.keys()
    for name in expected.keys() - {'input_quantizer.scale'}:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-3, atol=tolerance)


@pytest.mark.parametrize('per_channel', [False, True])
@pytest.mark.parametrize('bits', [2, 3, 4, 5, 8])
@pytest.mark.parametrize('name', LAYERS)
def test_fused_equals_reference(name, bits, per_channel) -> None:
    layer, x = layer_and_input(name, bits, per_channel_input=per_channel)
    expected, actual = step(layer, x, 'reference'), step(layer, x, 'fused')
    assert_alike(expected, actual)
    scale = layer.input_quantizer.scale
    factor = 1 / (max(x.numel() // scale.numel(), 1) * (2 ** (bits - 1) - 1)) ** 0.5
    bound = factor * RESIDUAL_ERROR * expected['x'].abs().sum()
    found, exact = actual['input_quantizer.scale'], expected['input_quantizer.scale']
    assert ((found - exact).abs() <= bound + 1e-4).all()


@pytest.mark.parametrize('scheme', [(True, True), (False, True), (False, False)])
def test_range_types(scheme) -> None:
    layer, x = layer_and_input('linear', scheme=scheme)
    assert_alike(step(layer, x.abs(), 'reference'), step(layer, x.abs(), 'fused'))


def test_weight_trained_with_its_quantizer() -> None:
    layer, x = layer_and_input('linear')
    with torch.no_grad():
        rows = layer.weight.abs().amax(1) / 7
    layer.weight_quantizer.set_qparams(rows, torch.zeros(7))
    assert_alike(step(layer, x, 'reference'), step(layer, x, 'fused'))


@pytest.mark.parametrize('frozen', ['weight', 'bias', 'scale', 'input'])
def test_what_is_frozen_gets_no_gradient(frozen) -> None:
    layer, x = layer_and_input('linear')
    target = layer.input_quantizer.scale if frozen == 'scale' else getattr(layer, frozen, None)
    if target is not None:
        target.requires_grad_(False)
    set_engine(layer, 'fused')
    x.requires_grad_(frozen != 'input')
    layer(x).sum().backward()
    got = {n: p.grad is not None for n, p in layer.named_parameters()}
    got['input'] = x.grad is not None
    got['scale'] = got.pop('input_quantizer.scale')
    assert {n for n, has in got.items() if not has} == {frozen}


def test_layouts() -> None:
    layer, x = layer_and_input('conv')
    x = x.contiguous(memory_format=torch.channels_last)
    assert_alike(step(layer, x, 'reference'), step(layer, x, 'fused'))
    layer, x = layer_and_input('linear')
    run = lambda m, x: m(x.transpose(0, 1)[::2])  # noqa: E731
    assert_alike(step(layer, x, 'reference', run), step(layer, x, 'fused', run))


def test_saves_one_byte_an_element() -> None:
    layer, _ = layer_and_input('linear')
    set_engine(layer, 'fused')
    x = torch.randn(3, 11, 13, requires_grad=True)
    assert saved_bytes(layer, lambda: layer(x)) == x.numel()  # the scale is a parameter
    layer, _ = layer_and_input('linear', bits=8)
    set_engine(layer, 'fused')
    assert saved_bytes(layer, lambda: layer(x)) == x.numel() + (x.numel() + 1) // 2


@pytest.mark.parametrize('name', ['linear', 'conv'])
def test_autocast(name) -> None:
    def run(layer: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast('cpu', torch.bfloat16):
            return layer(x)

    layer, x = layer_and_input(name)
    expected, actual = step(layer, x, 'reference', run), step(layer, x, 'fused', run)
    assert actual['out'].dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for n, g in actual.items() if n != 'out')
    assert_alike(expected, actual, tolerance=5e-2)


@pytest.mark.parametrize('reentrant', [False, True])
def test_activation_checkpointing(reentrant) -> None:
    layer, x = layer_and_input('linear')
    run = lambda m, x: checkpoint(m, x, use_reentrant=reentrant)  # noqa: E731
    plain, again = step(layer, x, 'fused'), step(layer, x, 'fused', run)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_differentiating_twice_is_one_clear_error() -> None:
    layer, x = layer_and_input('linear')
    set_engine(layer, 'fused')
    x.requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r'cannot be differentiated twice.*set_quantization'):
        grad.square().sum().backward()


@pytest.mark.parametrize('name', ['linear', 'linear_no_bias', 'conv'])
def test_output_may_be_changed_in_place(name) -> None:
    layer, x = layer_and_input(name)
    run = lambda m, x: nn.functional.relu_(m(x))  # noqa: E731
    assert_alike(step(layer, x, 'reference', run), step(layer, x, 'fused', run))


def test_no_graph_no_codes() -> None:
    layer, x = layer_and_input('linear')
    set_engine(layer, 'fused')
    layer.requires_grad_(False)
    assert layer(x).grad_fn is None
    layer.input_quantizer.enabled = False
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_not_finite_input_makes_the_loss_not_finite() -> None:
    layer, x = layer_and_input('linear')
    set_engine(layer, 'fused')
    x[0, 0, 0] = float('inf')
    assert layer(x)[0, 0].isnan().all()
