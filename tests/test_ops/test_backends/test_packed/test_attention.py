# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import copy

import pytest
import torch
from torch import Tensor, nn

from gplq_mm.ops import QuantMatMul, quantized_attention, set_engine
from gplq_mm.ops.attention.products import added
from gplq_mm.ops.float_matmul import FloatMatMul
from gplq_mm.quantizers import FakeQuantizer, PerChannel, PerRow, PerTensor, QuantSpec
from tests.helpers.reference import calibrated
from tests.helpers.saved import saved_bytes

B, HEADS, N, D = 2, 3, 7, 5


def product(bits: tuple[int, int], per_head: bool, probabilities: bool = False) -> QuantMatMul:
    granularity = PerChannel(1) if per_head else PerTensor()
    made = []
    for index, num_bits in enumerate(bits):
        signed = not (probabilities and index == 0)
        spec = QuantSpec(num_bits, signed, granularity=granularity, learn_scale=True)
        quantizer = FakeQuantizer(spec, HEADS if per_head else None)
        top = 1.0 if probabilities and index == 0 else 2.0
        scale = torch.rand(quantizer.scale.shape) * 0.2 + top / spec.quant_range[1]
        quantizer.set_qparams(scale, torch.zeros_like(scale))
        made.append(quantizer)
    return QuantMatMul(*made)


class Attention(nn.Module):
    def __init__(self, bits=(4, 4, 4, 4), per_head=False, dropout: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qk = product(bits[:2], per_head)
        self.pv = product(bits[2:], per_head, probabilities=True)
        self.bias = nn.Parameter(torch.randn(1, HEADS, N, N))
        self.drop = nn.Identity() if dropout is None else dropout

    def forward(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.view(len(qkv), N, 3, HEADS, D).permute(2, 0, 3, 1, 4)
        return quantized_attention(self.qk, self.pv, q * 0.4, k, v, added, (self.bias,), self.drop)


def step(module: nn.Module, engine: str, batch: int = B) -> dict[str, Tensor]:
    module = copy.deepcopy(module)
    set_engine(module, engine)
    torch.manual_seed(1)
    x = torch.randn(batch, N, 3 * HEADS * D, requires_grad=True)
    out = module(x)
    out.backward(torch.randn_like(out))
    return {'out': out.detach(), 'x': x.grad, **{n: p.grad for n, p in module.named_parameters()}}


def assert_alike(expected, actual) -> None:
    assert torch.equal(expected['out'], actual['out'])
    for name in expected:
        tolerance = 0.1 if name.endswith('.scale') else 1e-5
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-3, atol=tolerance)


@pytest.mark.parametrize('per_head', [False, True])
@pytest.mark.parametrize('bits', [(4, 4, 4, 4), (2, 3, 2, 3), (8, 8, 8, 8), (4, 8, 4, 5)])
def test_fused_equals_reference(bits, per_head) -> None:
    module = Attention(bits, per_head)
    assert_alike(step(module, 'reference'), step(module, 'fused'))


def test_scale_of_the_probabilities_is_exact() -> None:
    expected, actual = (step(Attention(), engine) for engine in ('reference', 'fused'))
    name = 'pv.lhs_quantizer.scale'
    torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-6)


def test_empty_batch() -> None:
    module = Attention()
    assert step(module, 'fused', batch=0)['out'].shape == (0, HEADS, N, D)


@pytest.mark.parametrize('change', ['dropout', 'float', 'off'])
def test_falls_back_to_the_reference_exactly(change) -> None:
    module = Attention(dropout=nn.Dropout(0.5) if change == 'dropout' else None)
    if change == 'float':
        module.qk = FloatMatMul()
    if change == 'off':
        module.pv.lhs_quantizer.enabled = False
    expected, actual = step(module, 'reference'), step(module, 'fused')
    assert torch.equal(expected['out'], actual['out'])
    torch.testing.assert_close(actual['x'], expected['x'], rtol=1e-4, atol=1e-5)


def test_saves_three_bytes_for_q_k_and_v() -> None:
    module = Attention()
    set_engine(module, 'fused')
    x = torch.randn(B, N, 3 * HEADS * D, requires_grad=True)
    assert saved_bytes(module, lambda: module(x)) == x.numel()


def test_a_single_product_saves_codes() -> None:
    module = product((4, 4), False)
    lhs, rhs = torch.randn(2, 3, 5, 4), torch.randn(3, 4, 6)  # batch dimensions broadcast
    found = {}
    for engine in ('reference', 'fused'):
        copied = copy.deepcopy(module)
        set_engine(copied, engine)
        a, b = lhs.clone().requires_grad_(), rhs.clone().requires_grad_()
        out = copied(a, b)
        out.backward(torch.ones_like(out))
        found[engine] = [out.detach(), a.grad, b.grad]
    assert torch.equal(found['fused'][0], found['reference'][0])
    for actual, expected in zip(found['fused'], found['reference'], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_autocast() -> None:
    module, found = Attention(), {}
    for engine in ('reference', 'fused'):
        with torch.autocast('cpu', torch.bfloat16):
            found[engine] = step(module, engine)
    assert torch.equal(found['fused']['out'], found['reference']['out'])
    torch.testing.assert_close(found['fused']['x'], found['reference']['x'], rtol=0.1, atol=0.05)


def row_product(bits: tuple[int, int], codes: str | None = None, share: float = 0.8) -> QuantMatMul:
    """A scale a vector; with `codes` the left operand holds probabilities."""
    made = []
    for num_bits, axis in zip(bits, (-1, -2), strict=True):
        is_p = codes is not None and axis == -1
        scheme = (False, True) if is_p else (True, False)
        kind = codes if is_p and codes else 'uniform'
        spec = QuantSpec(num_bits, *scheme, PerRow(axis), learn_scale=True, codes=kind)
        quantizer = calibrated(FakeQuantizer(spec), torch.zeros(1))
        quantizer.set_qparams(quantizer.scale * share, quantizer.zero_point)
        made.append(quantizer)
    return QuantMatMul(*made)


def row_attention(bits=(4, 4, 4, 4), codes='uniform', share=0.8) -> Attention:
    module = Attention()
    module.qk = row_product(bits[:2], share=share)
    module.pv = row_product(bits[2:], codes, share)
    return module


@pytest.mark.parametrize('share', [0.6, 1.0, 1.3])
@pytest.mark.parametrize('codes', ['uniform', 'log2', 'log_sqrt2', 'adalog'])
@pytest.mark.parametrize('bits', [(4, 4, 4, 4), (2, 3, 2, 3), (8, 8, 4, 5)])
def test_fused_equals_reference_with_a_scale_a_vector(bits, codes, share) -> None:
    module = row_attention(bits, codes, share)
    expected, actual = step(module, 'reference'), step(module, 'fused')
    assert torch.equal(expected['out'], actual['out'])
    for name in expected:
        if name.endswith('.scale'):
            continue
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-3, atol=1e-4)
    assert_scales_alike(expected, actual)


def assert_scales_alike(expected, actual) -> None:
    """The error of the residuals is at most 1/30 of a step an element."""
    names = [n for n in expected if n.endswith('.scale')]
    assert len(names) == 4
    a, b = (torch.stack([x[n] for n in names]) for x in (expected, actual))
    assert (a - b).norm() <= 0.2 * a.norm()
    name = 'pv.lhs_quantizer.scale'  # computed again: exact
    torch.testing.assert_close(actual[name], expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('codes', ['uniform', 'log2'])
@pytest.mark.parametrize('batch', [0, 1])
def test_batches_of_none_and_one_with_a_scale_a_vector(batch, codes) -> None:
    module = row_attention(codes=codes)
    expected, actual = step(module, 'reference', batch), step(module, 'fused', batch)
    assert torch.equal(expected['out'], actual['out'])
    assert actual['out'].shape == (batch, HEADS, N, D)
    torch.testing.assert_close(actual['x'], expected['x'], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('tokens', [1, 2, 67])
@pytest.mark.parametrize('heads', [1, 3])
@pytest.mark.parametrize('codes', ['uniform', 'log2'])
def test_other_lengths_and_memory_layouts(codes, heads, tokens) -> None:
    products = row_product((4, 4)), row_product((4, 4), codes)
    found = {}
    for engine in ('reference', 'fused'):
        layouts = []
        for layout in ('qkv', 'contiguous', 'keys first'):
            modules = nn.ModuleList(copy.deepcopy(products))
            set_engine(modules, engine)
            torch.manual_seed(2)
            qkv = torch.randn(2, tokens, 3, heads, D, requires_grad=True)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            if layout == 'contiguous':
                q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
            elif layout == 'keys first':
                k = k.transpose(-2, -1).contiguous().transpose(-2, -1)
            out = quantized_attention(*modules, q, k, v, added)
            out.backward(torch.ones_like(out))
            layouts.append((out.detach(), qkv.grad))
        assert all(torch.equal(layouts[0][0], other[0]) for other in layouts[1:])
        found[engine] = layouts
    for reference, fused in zip(found['reference'], found['fused'], strict=True):
        assert torch.equal(reference[0], fused[0])
        torch.testing.assert_close(fused[1], reference[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('shapes', [((2, 3, 5, 4), (3, 4, 6)), ((1, 1, 1, 1), (1, 1, 1, 1)),
                                    ((2, 2, 13, 7), (2, 2, 7, 11))])  # fmt: skip
@pytest.mark.parametrize('bits', [(2, 3), (4, 4), (8, 8)])
def test_a_single_product_with_a_scale_a_vector(bits, shapes) -> None:
    module = row_product(bits)
    found = {}
    for engine in ('reference', 'fused'):
        copied = copy.deepcopy(module)
        set_engine(copied, engine)
        torch.manual_seed(0)
        a, b = (torch.randn(shape, requires_grad=True) for shape in shapes)
        out = copied(a, b)
        out.backward(torch.randn(out.shape))
        scales = torch.stack([p.grad for p in copied.parameters()])
        found[engine] = [out.detach(), a.grad, b.grad, scales]
    assert torch.equal(found['fused'][0], found['reference'][0])
    for actual, expected in zip(found['fused'][1:3], found['reference'][1:3], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)
    error = (found['fused'][3] - found['reference'][3]).norm()
    assert error <= 0.15 * found['reference'][3].norm() + 1e-3


def test_with_a_scale_a_vector_little_more_than_the_codes_is_saved() -> None:
    module = row_attention(codes='log2')
    set_engine(module, 'fused')
    x = torch.randn(B, N, 3 * HEADS * D, requires_grad=True)
    vectors = B * HEADS * (N + N + D)  # of q, k (transposed) and v
    assert saved_bytes(module, lambda: module(x)) == x.numel() + vectors * (4 + 4)


@pytest.mark.parametrize('side', ['qk.lhs', 'qk.rhs', 'pv.rhs'])
def test_logarithmic_codes_of_other_operands_fall_back_to_the_reference(side) -> None:
    module = row_attention()
    product, operand = getattr(module, side[:2]), f'{side[3:]}_quantizer'
    axis = -1 if operand.startswith('lhs') else -2
    spec = QuantSpec(4, False, True, PerRow(axis), learn_scale=True, codes='log2')
    setattr(product, operand, calibrated(FakeQuantizer(spec), torch.zeros(1)))
    expected, actual = step(module, 'reference'), step(module, 'fused')
    assert torch.equal(expected['out'], actual['out'])
    names = [n for n in expected if not n.endswith('.scale')] + [f'{side}_quantizer.scale']
    for name in names:  # the other product may still pack: its scales are off by their residuals
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-3, atol=1e-4)


def test_autocast_with_a_scale_a_vector() -> None:
    module, found = row_attention(codes='log2'), {}
    for engine in ('reference', 'fused'):
        with torch.autocast('cpu', torch.bfloat16):
            found[engine] = step(module, engine)
    assert torch.equal(found['fused']['out'], found['reference']['out'])
    torch.testing.assert_close(found['fused']['x'], found['reference']['x'], rtol=0.1, atol=0.05)
