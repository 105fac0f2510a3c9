# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import itertools

import pytest
import torch

from gplq_mm.ops import Attention, Engine, QuantMatMul
from gplq_mm.ops.attention import multihead, window
from gplq_mm.ops.attention.products import added, multiplied
from gplq_mm.ops.backends.integer import attention, kernels
from gplq_mm.ops.dispatch import compute, explain
from gplq_mm.quantizers import FakeQuantizer, PerRow, QuantSpec
from tests.helpers.reference import calibrated

pytestmark = pytest.mark.skipif(
    kernels.load()[0] is None or bool(attention.softmax_differs(49)),
    reason=f"{kernels.load()[1]}; torch's softmax is not repeated on this processor",
)
B, HEADS = 6, 3


def quantizer(spec, share=None, like=None):
    made = FakeQuantizer(spec)
    if share is None:
        return calibrated(made, like)
    made.set_qparams(torch.tensor(share), torch.tensor(0.0))
    return made


def rows(axis, bits=4):
    return quantizer(QuantSpec(bits, granularity=PerRow(axis), symmetric=False), 1 / (2**bits - 1))


def probabilities(kind, bits=4):
    if kind == 'tensor':
        return quantizer(QuantSpec(bits, False), like=torch.rand(4, 9).softmax(-1))
    if kind == 'row':
        spec = QuantSpec(bits, False, granularity=PerRow(-1))
        return quantizer(spec, 1 / (2**bits - 1))
    spec = QuantSpec(bits, False, granularity=PerRow(-1), codes=kind)
    return quantizer(spec, 1 / 16384)


def operation(kind='log_sqrt2', bits=4, adjust=added, extras=(), factor=1.0):
    products = (
        QuantMatMul(rows(-1, bits), rows(-2, bits)),
        QuantMatMul(probabilities(kind, bits), rows(-2, bits)),
    )
    for product in products:
        product.engine = Engine(inference='integer')
    return Attention(*products, adjust, extras, query_factor=factor)


def inputs(queries=49, keys=49, depth=32, width=32):
    """Views of one tensor, as a projection gives them."""
    torch.manual_seed(0)
    tokens = torch.randn(B, max(queries, keys), 3, HEADS, max(depth, width)) * 2
    q, k, v = tokens.permute(2, 0, 3, 1, 4)
    return (
        q[:, :, :queries, :depth],
        k[:, :, :keys, :depth].transpose(-2, -1),
        v[:, :, :keys, :width],
    )


def check(made, q, k, v) -> None:
    assert attention.refusal(made, q, k, v) == ''
    assert torch.equal(attention.attention(made, q, k, v), made.reference(q, k, v))


UNIFORM, LOG = ('tensor', 'row'), ('log2', 'log_sqrt2', 'adalog')


@pytest.mark.parametrize(
    ('kind', 'bits'),
    [*itertools.product(UNIFORM, (4, 3, 2, 8)), *itertools.product(LOG, (4, 3, 2))],
)
@torch.no_grad()
def test_equals_the_products_one_by_one(kind, bits) -> None:
    check(operation(kind, bits), *inputs())


@pytest.mark.parametrize('queries', [1, 23, 24, 50])
@pytest.mark.parametrize('keys', [1, 7, 8, 9, 17, 49, 197, 257])
@torch.no_grad()
def test_shapes(queries, keys) -> None:
    check(operation(), *inputs(queries, keys, depth=20, width=36))


def biases():
    torch.manual_seed(1)
    bias = torch.randn(1, HEADS, 49, 49)
    mask = torch.zeros(3, 49, 49).masked_fill_(torch.rand(3, 49, 49) < 0.3, -100.0)
    factor = torch.rand(HEADS, 1, 1) * 3
    padding = torch.rand(B, 1, 1, 49) < 0.4
    return {
        'added': (added, (bias, bias[:, :1, :1])),
        'multiplied': (multiplied, (factor,)),
        'biased': (window.biased, (bias, mask)),
        'masked windows': (window.masked, (mask,)),
        'cosine': (window.scaled_and_biased, (factor, bias, mask)),
        'no mask': (multihead.masked, ()),
        'masks': (multihead.masked, (bias[0], padding)),
    }


@pytest.mark.parametrize('name', list(biases()))
@torch.no_grad()
def test_biases_and_masks(name) -> None:
    adjust, extras = biases()[name]
    check(operation(adjust=adjust, extras=extras), *inputs())


@torch.no_grad()
def test_factor_of_queries() -> None:
    check(operation(factor=32**-0.5), *inputs())
    q, k, v = inputs()
    out = operation(factor=0.3).reference(q, k, v)
    assert torch.equal(out, operation().reference(q * 0.3, k, v))


@torch.no_grad()
def test_several_threads() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        check(operation(), *inputs())
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def test_nan_stays_where_it_is() -> None:
    q, k, v = (x.clone() for x in inputs())
    q[1, 2, 3, 4] = float('nan')
    out = attention.attention(operation(), q, k, v)
    assert out[1, 2, 3].isnan().all() and out.isnan().sum() == out.shape[-1]
    mask = torch.zeros(49, 49)
    mask[5] = -float('inf')
    out = attention.attention(operation(extras=(mask,)), *inputs())
    assert out[:, :, 5].isnan().all() and not out[:, :, 6].isnan().any()


@torch.no_grad()
def test_refusals() -> None:
    q, k, v = inputs()
    bias = torch.zeros(1, HEADS, 49, 49)
    refused = {
        'a bias or mask': operation(extras=(bias.double(),)),
        'logits that are not': operation(adjust=lambda logits: logits.square()),
    }
    for reason, made in refused.items():
        assert attention.refusal(made, q, k, v).startswith(reason)
        assert torch.equal(compute(made, q, k, v), made.reference(q, k, v))
    made = operation()
    assert 'shapes' in attention.refusal(made, q, k, v[:, :, :9])
    handle = made.qk_matmul.register_forward_hook(lambda *_: None)
    assert attention.refusal(made, q, k, v) == 'hooks watch the products'
    handle.remove()
    assert explain(made, q, k, v).startswith('attention: integer')


def test_a_softmax_that_differs_is_found(monkeypatch) -> None:
    lanes, address = attention.softmax_exponential()
    wrong = 24 - lanes, address  # 16 for 8, 8 for 16
    monkeypatch.setattr(attention, 'softmax_exponential', lambda: wrong)
    assert 'differs' in attention.softmax_differs.__wrapped__(197)
    monkeypatch.setattr(attention, 'softmax_exponential', lambda: None)
    assert 'not known' in attention.softmax_differs.__wrapped__(197)
