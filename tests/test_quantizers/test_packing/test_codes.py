# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gplq_mm.quantizers import PerRow, QuantSpec, integer_range
from gplq_mm.quantizers.fake_quantizer import Grid, quantize_packed, quantize_values
from gplq_mm.quantizers.learned_scale import fake_quantize_ste, level_codes_ste
from gplq_mm.quantizers.log_codes import default_levels
from gplq_mm.quantizers.packing import cpu_kernels
from gplq_mm.quantizers.packing.codes import (
    RESIDUAL_ERROR,
    packed_backward,
    softmax_backward,
    unpack_values,
)
from gplq_mm.quantizers.row_range import (
    ROW_SLACK,
    full_range_share,
    row_extent,
    row_scale,
    row_zero_point,
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
    values = fake_quantize_ste(x, scale, zero_point, grid.qmin, grid.qmax, grid.slack)
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


ROW_SHAPES = {
    'usual': (2, 3, 7, 5),
    'batch of one': (1, 3, 7, 5),
    'one token': (2, 3, 1, 5),
    'one channel': (2, 3, 7, 1),
    'one of all': (1, 1, 1, 1),
    'prime': (1, 2, 131, 67),
    'long': (1, 1, 3, 4099),  # longer than what C sums at a time
    'empty': (0, 3, 7, 5),
}
LAYOUTS = {
    'contiguous': lambda x: x,
    'of qkv': lambda x: x.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3),
    'transposed': lambda x: x.transpose(-2, -1).contiguous().transpose(-2, -1),
    'keys of qkv': lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    'batch inside': lambda x: x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3),
    'with gaps': lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
}


def row_case(bits: int, scheme: tuple[bool, bool], axis: int, shape, layout: str):
    """Input, a scale for each vector along an axis, zero points, grid; a part is clipped."""
    spec = QuantSpec(bits, *scheme, granularity=PerRow(axis))
    generator = torch.Generator().manual_seed(bits)
    spread = torch.rand(*shape[:3], 1, generator=generator) * 3 + 0.01
    x = LAYOUTS[layout]((torch.randn(shape, generator=generator) + 0.4) * spread)
    extent, middle = row_extent(x, spec)
    scale = row_scale(torch.tensor(full_range_share(spec) * 0.6), extent)
    zero_point = row_zero_point(scale, middle, spec)
    return x, scale, zero_point, Grid(*spec.quant_range, zero_point, ROW_SLACK)


def check_against_the_reference(x, scale, zero_point, grid) -> None:
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    values, grad_x, grad_scale = reference(x, scale, zero_point, grid, grad)
    found, packed = quantize_packed(x, scale, grid)
    assert torch.equal(found, values)
    assert torch.equal(quantize_values(x, scale, grid), values)
    assert torch.equal(unpack_values(packed, scale, grid), values)
    found_x, found_scale = packed_backward(packed, grad.clone(), scale, grid, True)
    assert torch.equal(found_x, grad_x)
    assert found_scale.shape == grad_scale.shape == scale.shape
    bound = (grad * (grad_x == grad)).abs().sum_to_size(scale.shape) * RESIDUAL_ERROR
    assert ((found_scale - grad_scale).abs() <= bound + 1e-4).all()
    assert packed_backward(packed, grad.clone(), scale, grid, False)[1] is None


@pytest.mark.parametrize('shape', ROW_SHAPES.values(), ids=list(ROW_SHAPES))
@pytest.mark.parametrize(('bits', 'scheme'), [(2, (True, False)), (4, (False, False)),
                                              (4, (True, True)), (8, (True, False))])  # fmt: skip
@pytest.mark.parametrize('axis', [-1, -2])
def test_a_scale_a_vector(bits, scheme, axis, shape) -> None:
    for layout in LAYOUTS:
        check_against_the_reference(*row_case(bits, scheme, axis, shape, layout))


@pytest.mark.parametrize('shape', ROW_SHAPES.values(), ids=list(ROW_SHAPES))
@pytest.mark.parametrize('axis', [-1, -2])
@pytest.mark.parametrize('bits', [3, 8])
def test_both_implementations_agree_on_a_scale_a_vector(
    passes, monkeypatch, bits, axis, shape
) -> None:
    if passes == 'torch':
        pytest.skip('compares the two')
    for layout in LAYOUTS:
        x, scale, _, grid = row_case(bits, (True, False), axis, shape, layout)
        compiled, compiled_scale = everything(x, scale, grid)
        with monkeypatch.context() as patch:
            patch.setattr(cpu_kernels, 'load', lambda: (None, ''))
            plain, plain_scale = everything(x, scale, grid)
        assert all(map(torch.equal, compiled, plain))
        torch.testing.assert_close(compiled_scale, plain_scale, rtol=1e-4, atol=1e-4)


def everything(x, scale, grid):
    """Values, bytes, values again and the input's gradient; the scale's gradient."""
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    values, packed = quantize_packed(x, scale, grid)
    grad_x, grad_scale = packed_backward(packed, grad, scale, grid, True)
    return [values, *packed, unpack_values(packed, scale, grid), grad_x], grad_scale


def test_scales_along_axes_that_lie_apart_are_left_to_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SHAPE, generator=generator)
    for shape in ((2, 1, 7, 1), (1, 3, 1, 5)):
        scale = torch.rand(shape, generator=generator) + 0.1
        assert not cpu_kernels.fits(x, scale) and cpu_kernels.kernels_for(x, scale) is None
        check_against_the_reference(x, scale, torch.zeros(()), Grid(-8, 7, 0.0))


@pytest.mark.parametrize('shape', ROW_SHAPES.values(), ids=list(ROW_SHAPES))
@pytest.mark.parametrize('of', ['tensor', -1, -2, 'head'])
@pytest.mark.parametrize('codes', [('log2', 4), ('log_sqrt2', 3), ('adalog', 4)])
def test_values_of_logarithmic_codes(codes, of, shape) -> None:
    levels = default_levels(*codes)
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)).pow(6)
    if of == 'tensor':
        scale = torch.tensor(1.0)
    elif of == 'head':
        scale = torch.linspace(0.3, 1, shape[1]).view(1, -1, 1, 1)
    else:
        scale = x.amax(of, keepdim=True)
    scale = scale * (0.7 / float(levels[-1]))  # a part lies above the range
    grid = Grid(0, 2 ** codes[1] - 1, 0.0, levels=levels)
    expected = level_codes_ste(x, scale, levels) * scale
    for lay_out in LAYOUTS.values():
        assert torch.equal(quantize_values(lay_out(x), scale, grid), expected)


def test_logarithmic_codes_are_not_packed() -> None:
    grid = Grid(0, 15, 0.0, levels=default_levels('log2', 4))
    with pytest.raises(ValueError, match='recomputed, not packed'):
        quantize_packed(torch.rand(3), torch.tensor(0.1), grid)


@pytest.mark.parametrize('tokens', [1, 2, 7, 131, 4099])
@pytest.mark.parametrize('scales', ['tensor', 'head', 'row'])
@pytest.mark.parametrize('codes', ['uniform', 'log2'])
@pytest.mark.parametrize('batch', [1, 2])
def test_softmax_backward_of_rows_and_levels(batch, codes, scales, tokens) -> None:
    generator = torch.Generator().manual_seed(tokens)
    logits = (torch.randn(batch, 3, 2, tokens, generator=generator) * 2).requires_grad_()
    p = logits.softmax(-1)
    levels = default_levels('log2', 4) if codes == 'log2' else None
    top = 15.0 if levels is None else float(levels[-1])
    shape = {'tensor': (), 'head': (1, 3, 1, 1), 'row': (batch, 3, 2, 1)}[scales]
    extent = p.detach().amax(-1, keepdim=True) if scales == 'row' else p.detach().max()
    scale = torch.rand(shape, generator=generator) * 0.5 + 0.4  # a part lies above the range
    scale = (scale * extent / top).requires_grad_()
    slack = ROW_SLACK if scales == 'row' else 0.0
    if levels is None:
        values = fake_quantize_ste(p, scale, torch.zeros(()), 0, 15, slack)
    else:
        values = level_codes_ste(p, scale, levels) * scale
    grad = torch.randn(p.shape, generator=generator)
    values.backward(grad)
    grid = Grid(0, 15, 0.0, slack, levels)
    found = softmax_backward(p.detach(), grad.clone(), scale.detach(), grid, True)
    torch.testing.assert_close(found[0], logits.grad, rtol=1e-4, atol=1e-6)
    assert found[1].shape == scale.shape
    tolerance = 1e-5 * float((values.detach() / scale.detach() * grad).abs().sum())
    torch.testing.assert_close(found[1], scale.grad, rtol=1e-3, atol=tolerance)
    assert torch.equal(quantize_values(p.detach(), scale.detach(), grid), values.detach())
    without = softmax_backward(p.detach(), grad.clone(), scale.detach(), grid, False)
    assert without[1] is None and torch.equal(without[0], found[0])
