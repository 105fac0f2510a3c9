# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import pytest
import torch

from gplq_mm.ops import Engine, QuantMatMul
from gplq_mm.ops.backends import exact
from gplq_mm.ops.backends.integer import kernels, matmul
from gplq_mm.quantizers import FakeQuantizer, PerChannel, PerRow, PerTensor, QuantSpec
from gplq_mm.quantizers.log_codes import candidate_bases, log_levels
from tests.helpers.reference import SCHEMES, calibrated

pytestmark = pytest.mark.skipif(kernels.load()[0] is None, reason=kernels.load()[1])


def quantizer(x, axis, bits=4, scheme=(True, False), granularity='tensor'):
    own = {'tensor': PerTensor(), 'head': PerChannel(1), 'row': PerRow(axis)}[granularity]
    size = x.shape[1] if granularity == 'head' else None
    made = FakeQuantizer(QuantSpec(bits, *scheme, granularity=own), size)
    if granularity == 'row':
        made.set_qparams(torch.tensor(0.9 / (2**bits - 1)), torch.tensor(0.0))
        return made
    return calibrated(made, x)


def operands(depth=10, rows=13, columns=21):
    """Queries and transposed keys as attention gives them: views of one tensor."""
    torch.manual_seed(0)
    size = max(rows, columns)
    tokens = torch.randn(2, size, 3, depth) + 0.3
    x = tokens.transpose(1, 2)
    return x[:, :, :rows], (x * 1.7).transpose(-2, -1)[..., :columns]


def product_of(left, right):
    product = QuantMatMul(left, right)
    product.engine = Engine(inference='integer')
    return product


@pytest.mark.parametrize('bits', [4, 3, 8])
@pytest.mark.parametrize('scheme', SCHEMES)
@pytest.mark.parametrize('granularity', ['tensor', 'head', 'row'])
@torch.no_grad()
def test_equals_the_simulation(granularity, scheme, bits) -> None:
    for lhs, rhs in (operands(), (operands()[0], operands()[1].contiguous())):
        left = quantizer(lhs, -1, bits, scheme, granularity)
        right = quantizer(rhs, -2, bits, scheme, granularity)
        product = product_of(left, right)
        assert matmul.refusal(product, lhs, rhs) == ''
        assert torch.equal(matmul.matmul(product, lhs, rhs), exact.matmul(product, lhs, rhs))


@pytest.mark.parametrize('shape', [(1, 1, 1), (64, 7, 17), (197, 50, 16), (33, 6, 64)])
@torch.no_grad()
def test_shapes(shape) -> None:
    lhs, rhs = operands(*shape)
    product = product_of(quantizer(lhs, -1), quantizer(rhs, -2, granularity='row'))
    assert torch.equal(product(lhs, rhs), exact.matmul(product, lhs, rhs))
    lhs, rhs = lhs[0, 0], rhs[0, 0]
    assert torch.equal(product(lhs, rhs), exact.matmul(product, lhs, rhs))
    lhs, rhs = lhs.expand(2, 2, 1, *lhs.shape), rhs.expand(2, 2, 1, *rhs.shape)
    assert torch.equal(product(lhs, rhs), exact.matmul(product, lhs, rhs))


LOG = [(codes, bits) for codes in ('log2', 'log_sqrt2', 'adalog') for bits in (2, 3, 4)]


@pytest.mark.parametrize('row', [False, True])
@pytest.mark.parametrize(('codes', 'bits'), [*LOG, ('adalog', 5)])
@torch.no_grad()
def test_logarithmic_probabilities(codes, bits, row) -> None:
    _, rhs = operands(19, 13, 19)
    lhs = (torch.randn(2, 3, 13, 19) * 4).softmax(-1)
    rhs = rhs.transpose(-2, -1)[..., :10].contiguous()
    granularity = PerRow(-1) if row else PerTensor()
    for base in candidate_bases(codes, bits):
        spec = QuantSpec(bits, signed=False, symmetric=True, granularity=granularity, codes=codes)
        left = FakeQuantizer(spec)
        levels = log_levels(bits, base)
        left.set_levels(levels)
        left.set_qparams(torch.tensor(1.0 / float(levels[-1])), torch.tensor(0.0))
        product = product_of(left, quantizer(rhs, -2, granularity='row'))
        assert matmul.refusal(product, lhs, rhs) == ''
        assert torch.equal(product(lhs, rhs), exact.matmul(product, lhs, rhs))


@torch.no_grad()
def test_several_threads() -> None:
    lhs, rhs = operands(64, 90, 90)
    product = product_of(quantizer(lhs, -1, granularity='row'), quantizer(rhs, -2))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert torch.equal(product(lhs, rhs), exact.matmul(product, lhs, rhs))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('granularity', ['tensor', 'row'])
@torch.no_grad()
def test_values_that_are_not_finite(granularity, value) -> None:
    for side in (0, 1):
        lhs, rhs = (x.clone() for x in operands())
        left = quantizer(lhs, -1, granularity=granularity)
        right = quantizer(rhs, -2, granularity=granularity)
        product = product_of(left, right)
        (lhs, rhs)[side][0, 1, 2, 3] = value
        expected = exact.matmul(product, lhs, rhs)
        torch.testing.assert_close(product(lhs, rhs), expected, rtol=0, atol=0, equal_nan=True)


@torch.no_grad()
def test_a_changed_scale_is_read_anew() -> None:
    lhs, rhs = operands()
    product = product_of(quantizer(lhs, -1), quantizer(rhs, -2))
    before = product(lhs, rhs)
    product.lhs_quantizer.scale.mul_(3)
    assert torch.equal(product(lhs, rhs), exact.matmul(product, lhs, rhs))
    assert not torch.equal(product(lhs, rhs), before)


@torch.no_grad()
def test_reasons_to_refuse() -> None:
    lhs, rhs = operands()
    product = product_of(quantizer(lhs, -1), quantizer(rhs, -2))
    assert 'broadcast' in matmul.refusal(product, lhs[:1], rhs)
    assert torch.equal(product(lhs[:1], rhs), exact.matmul(product, lhs[:1], rhs))
    product = product_of(quantizer(lhs, -1, granularity='head'), quantizer(rhs, -2))
    assert 'four axes' in matmul.refusal(product, lhs[0], rhs[0])


@torch.no_grad()
def test_shapes_that_do_not_fit_give_the_error_of_torch() -> None:
    lhs, rhs = operands()
    product = product_of(quantizer(lhs, -1), quantizer(rhs, -2))
    with pytest.raises(RuntimeError):
        product(lhs[..., :-1], rhs)
