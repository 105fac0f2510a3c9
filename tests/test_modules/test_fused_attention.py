# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import copy

import pytest
import torch
from torch import Tensor, nn

from gplq_mm.modules import QuantMatMul, quantized_attention, set_engine
from gplq_mm.modules.attention import added
from gplq_mm.modules.float_matmul import FloatMatMul
from gplq_mm.quantizers import FakeQuantizer, PerChannel, PerTensor, QuantSpec
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
