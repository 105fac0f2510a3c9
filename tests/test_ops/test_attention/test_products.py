# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import pytest
import torch
import torch.nn.functional as F

from gplq_mm.ops import QuantMatMul, quant_scaled_dot_product_attention
from gplq_mm.quantizers import FakeQuantizer, QuantSpec, build_observer
from tests.helpers.layers import set_enabled


def qkv(n=5, m=7):
    return torch.randn(2, 3, n, 4), torch.randn(2, 3, m, 4), torch.randn(2, 3, m, 4)


def matmuls(*inputs, bits=8, **kwargs):
    """Both products, calibrated by a pass over the inputs as a run would do it."""
    signed, unsigned = QuantSpec(bits), QuantSpec(bits, signed=False)
    products = [
        QuantMatMul(FakeQuantizer(spec), FakeQuantizer(signed)) for spec in (signed, unsigned)
    ]
    found = [m for p in products for m in p.modules() if isinstance(m, FakeQuantizer)]
    for q in found:
        q.observer = build_observer(q.spec)
    quant_scaled_dot_product_attention(*products, *inputs, **kwargs)
    for q in found:
        q.set_qparams(*q.observer.calculate_qparams())
        q.observer = None
    return products


def masks():
    keep = torch.rand(5, 7) > 0.4
    keep[:, 0] = True
    return {'none': None, 'bool': keep, 'float': torch.randn(5, 7)}


@pytest.mark.parametrize('mask', masks())
@pytest.mark.parametrize('scale', [None, 0.3])
def test_switched_off_it_is_the_float_call_bit_for_bit(mask, scale):
    inputs, options = qkv(), {'attn_mask': masks()[mask], 'scale': scale}
    products = matmuls(*inputs, **options)
    for product in products:
        set_enabled(product, False)
    expected = F.scaled_dot_product_attention(*inputs, **options)
    assert torch.equal(quant_scaled_dot_product_attention(*products, *inputs, **options), expected)


def test_switched_off_the_models_own_function_is_called():
    calls = []

    def own(query, key, value, attn_mask=None, dropout_p=0.0):
        calls.append(dropout_p)
        return value

    inputs = qkv(7)
    products = matmuls(*inputs)
    for product in products:
        set_enabled(product, False)
    out = quant_scaled_dot_product_attention(
        *products, *inputs, dropout_p=0.25, float_attention=own
    )
    assert out is inputs[2] and calls == [0.25]


@pytest.mark.parametrize('mask', masks())
@pytest.mark.parametrize('scale', [None, 0.3])
@pytest.mark.parametrize('grad', [True, False])
def test_with_eight_bits_it_is_close_to_float(mask, scale, grad):
    inputs, options = qkv(), {'attn_mask': masks()[mask], 'scale': scale}
    products = matmuls(*inputs, **options)
    with torch.set_grad_enabled(grad):
        out = quant_scaled_dot_product_attention(*products, *inputs, **options)
    expected = F.scaled_dot_product_attention(*inputs, **options)
    assert 0 < (out - expected).abs().max() < 0.1


def test_the_operands_are_what_attention_multiplies():
    query, key, value = qkv()
    products = matmuls(query, key, value, bits=4)
    seen = []
    for product in products:
        product.register_forward_pre_hook(lambda _, args: seen.extend(args))
    quant_scaled_dot_product_attention(*products, query, key, value)
    assert torch.equal(seen[0], query * 0.5) and torch.equal(seen[1], key.transpose(-2, -1))
    assert torch.allclose(seen[2].sum(-1), torch.ones(2, 3, 5)) and torch.equal(seen[3], value)


def test_one_token():
    inputs = qkv(1, 1)
    products = matmuls(*inputs)
    with torch.no_grad():
        out = quant_scaled_dot_product_attention(*products, *inputs)
    assert torch.allclose(out, inputs[2], atol=0.03)


def test_dropout_drops_attention_weights():
    inputs = qkv(50, 50)
    products = matmuls(*inputs)
    dropped = quant_scaled_dot_product_attention(*products, *inputs, dropout_p=1.0)
    kept = quant_scaled_dot_product_attention(*products, *inputs, dropout_p=0.0)
    assert (dropped == 0).all() and not (kept == 0).all()
