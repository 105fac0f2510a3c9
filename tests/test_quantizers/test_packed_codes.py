# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gplq_mm.quantizers import cpu_kernels, integer_range
from gplq_mm.quantizers.grid import Grid
from gplq_mm.quantizers.learned_scale import fake_quantize_ste
from gplq_mm.quantizers.packed_codes import (
    RESIDUAL_ERROR,
    packed_backward,
    quantize_packed,
    quantize_values,
    softmax_backward,
    unpack_values,
)

SCALES = {'tensor': (), 'channel': (1, 1, 1, 5), 'head': (1, 3, 1, 1)}
SHAPE = (2, 3, 7, 5)


@pytest.fixture(params=['compiled', 'torch'], autouse=True)
def passes(request, monkeypatch) -> Iterator[str]:
    """Both implementations."""
    if request.param == 'torch':
        monkeypatch.setattr(cpu_kernels, 'load', lambda: (None, ''))
    elif cpu_kernels.load()[0] is None:
        pytest.skip(cpu_kernels.load()[1])
    yield request.param


def case(bits: int, signed: bool, symmetric: bool, shape: tuple[int, ...]):
    """Input with every code, a good part outside the range; scale, zero point, grid."""
    generator = torch.Generator().manual_seed(bits)
    qmin, qmax = integer_range(bits, signed)
    scale = torch.rand(shape, generator=generator) + 0.5
    middle = (qmin + qmax) / 2
    zero_point = torch.zeros(shape)
    if not symmetric:
        zero_point = (torch.rand(shape, generator=generator) * 5).round() + qmin
    x = torch.randn(SHAPE, generator=generator) * (qmax - qmin) / 3 + middle - zero_point
    offset = zero_point if zero_point.dim() and not symmetric else float(zero_point.flatten()[0])
    return x * scale, scale, zero_point, Grid(qmin, qmax, offset)


def reference(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, grad: Tensor):
    x, scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
    values = fake_quantize_ste(x, scale, zero_point, grid.qmin, grid.qmax)
    values.backward(grad)
    return values.detach(), x.grad, scale.grad


@pytest.mark.parametrize('granularity', SCALES)
@pytest.mark.parametrize('signed', [True, False])
@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('bits', range(2, 9))
def test_values_and_gradients(bits, symmetric, signed, granularity) -> None:
    x, scale, zero_point, grid = case(bits, signed, symmetric, SCALES[granularity])
    grad = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    values, grad_x, grad_scale = reference(x, scale, zero_point, grid, grad)
    found, packed = quantize_packed(x, scale, grid)
    assert torch.equal(found, values)
    assert torch.equal(quantize_values(x, scale, grid), values)
    assert torch.equal(unpack_values(packed, scale, grid), values)
    size = sum(p.numel() * p.element_size() for p in packed)
    assert size == (x.numel() if bits <= 4 else x.numel() + (x.numel() + 1) // 2)
    found_x, found_scale = packed_backward(packed, grad.clone(), scale, grid, True)
    assert torch.equal(found_x, grad_x)
    assert found_scale.shape == grad_scale.shape
    bound = (grad * (grad_x == grad)).abs().sum_to_size(scale.shape) * RESIDUAL_ERROR
    assert ((found_scale - grad_scale).abs() <= bound + 1e-4).all()
    assert packed_backward(packed, grad.clone(), scale, grid, False)[1] is None


def test_error_of_the_scales_gradient_is_much_smaller_than_its_bound() -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    grad = torch.randn(100_000, generator=torch.Generator().manual_seed(1))
    scale, grid = torch.tensor(0.4), Grid(-8, 7, 0.0)
    _, grad_x, expected = reference(x, scale, torch.tensor(0.0), grid, grad)
    _, packed = quantize_packed(x, scale, grid)
    _, found = packed_backward(packed, grad.clone(), scale, grid, True)
    bound = float(grad_x.abs().sum()) * RESIDUAL_ERROR
    assert abs(float(found - expected)) < bound / 50


def test_both_implementations_store_the_same_bytes(passes, monkeypatch) -> None:
    if passes == 'torch':
        pytest.skip('compares the two')
    for bits in (3, 4, 8):
        for shape in SCALES.values():
            x, scale, _, grid = case(bits, True, False, shape)
            _, compiled = quantize_packed(x, scale, grid)
            with monkeypatch.context() as patch:
                patch.setattr(cpu_kernels, 'load', lambda: (None, ''))
                _, plain = quantize_packed(x, scale, grid)
            assert all(map(torch.equal, compiled, plain))


@pytest.mark.parametrize(
    'make',
    [
        lambda x: x.permute(0, 2, 1, 3),
        lambda x: x.transpose(-2, -1),
        lambda x: x[:, :, 1:, ::2],
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x[:1, :1, :1, :1],
        lambda x: x[:0],
        lambda x: x.expand(4, 2, 3, 7, 5)[:, 0],
    ],
)
@pytest.mark.parametrize('per_channel', [False, True])
def test_layouts(make, per_channel) -> None:
    x = make(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)))
    scale = torch.rand(1, x.shape[1], 1, 1) + 0.1 if per_channel else torch.tensor(0.3)
    zero_point, grid = torch.zeros(()), Grid(-4, 3, 0.0)
    grad = torch.randn(x.shape)
    values, grad_x, grad_scale = reference(x, scale, zero_point, grid, grad)
    found, packed = quantize_packed(x, scale, grid)
    assert torch.equal(found, values)
    assert [s for s, n in zip(found.stride(), x.shape, strict=True) if n > 1] == [
        s for s, n in zip((x / scale).stride(), x.shape, strict=True) if n > 1
    ]
    found_x, found_scale = packed_backward(packed, grad.clone(), scale, grid, True)
    assert torch.equal(found_x, grad_x)
    torch.testing.assert_close(found_scale, grad_scale, rtol=0.2, atol=0.5)


def test_not_finite_stays_visible() -> None:
    x = torch.tensor([1.0, float('nan'), float('inf'), -float('inf'), 100.0])
    values, _ = quantize_packed(x, torch.tensor(0.5), Grid(-8, 7, 0.0))
    assert values.isnan().tolist() == [False, True, True, True, False]


@pytest.mark.parametrize('shape', [(), (1, 3, 1, 1)])
def test_softmax_backward_is_exact(shape) -> None:
    logits = torch.randn(SHAPE, requires_grad=True)
    scale = (torch.rand(shape) * 0.1 + 0.02).requires_grad_()
    p = logits.softmax(-1)
    values = fake_quantize_ste(p, scale, torch.zeros(()), 0, 7)
    grad = torch.randn(SHAPE)
    values.backward(grad)
    grid = Grid(0, 7, 0.0)
    found = softmax_backward(p.detach(), grad.clone(), scale.detach(), grid, True)
    torch.testing.assert_close(found[0], logits.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[1], scale.grad, rtol=1e-4, atol=1e-5)
