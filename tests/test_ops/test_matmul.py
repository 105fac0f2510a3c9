# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gplq_mm.ops import QuantMatMul
from gplq_mm.ops.backends.exact import accumulator_dtype
from gplq_mm.quantizers import (
    FakeQuantizer,
    PerChannel,
    PerRow,
    PerTensor,
    QuantSpec,
    UncalibratedError,
    build_observer,
)
from tests.helpers.layers import set_enabled, step
from tests.helpers.reference import SCHEMES, calibrated, centred, rescale, steps


def make(lhs, rhs, bits=(4, 4), schemes=((True, False), (False, True)), per_head=(False, False)):
    operands = []
    for x, num_bits, scheme, heads in zip((lhs, rhs), bits, schemes, per_head, strict=True):
        granularity = PerChannel(1) if heads else PerTensor()
        spec = QuantSpec(num_bits, *scheme, granularity=granularity, learn_scale=True)
        operands.append(calibrated(FakeQuantizer(spec, x.shape[1] if heads else None), x))
    return QuantMatMul(*operands)


def reference(matmul, lhs, rhs):
    """Product of int64 codes or levels, times the product of the scales."""
    scales = [steps(q, x)[0] for q, x in _operands(matmul, lhs, rhs)]
    total = np.matmul(*(centred(q, x) for q, x in _operands(matmul, lhs, rhs)))
    return rescale(total, scales[0] * scales[1], None)


def _operands(matmul, lhs, rhs):
    return (matmul.lhs_quantizer, lhs), (matmul.rhs_quantizer, rhs)


@given(
    bits=st.tuples(st.integers(2, 8), st.integers(2, 8)),
    schemes=st.tuples(st.sampled_from(SCHEMES), st.sampled_from(SCHEMES)),
    per_head=st.tuples(st.booleans(), st.booleans()),
    sizes=st.sampled_from([(1, 3, 1, 1, 5), (2, 3, 7, 11, 5), (2, 1, 13, 2, 3), (1, 4, 3, 17, 1)]),
    seed=st.integers(0, 10**6),
)
def test_inference_is_the_integer_reference_bit_for_bit(bits, schemes, per_head, sizes, seed):
    torch.manual_seed(seed)
    batch, heads, n, k, m = sizes
    lhs, rhs = torch.randn(batch, heads, n, k), torch.randn(batch, heads, k, m)
    matmul = make(lhs, rhs, bits, schemes, per_head)
    lhs, rhs = lhs * 1.3, rhs * 0.7
    with torch.no_grad():
        integer = matmul(lhs, rhs)
        assert torch.equal(integer, reference(matmul, lhs, rhs))
    assert torch.allclose(matmul(lhs, rhs), integer, rtol=1e-5, atol=1e-4)


def test_deep_sums_of_wide_codes_stay_exact():
    lhs, rhs = torch.rand(1, 2, 3, 1031) + 5, torch.rand(1, 2, 1031, 2) + 5
    matmul = make(lhs, rhs, (8, 8), ((False, True), (False, True)))
    dtype = accumulator_dtype(matmul.lhs_quantizer, matmul.rhs_quantizer, 1031)
    assert dtype == torch.float64
    with torch.no_grad():
        assert torch.equal(matmul(lhs, rhs), reference(matmul, lhs, rhs))


def test_an_empty_batch_and_a_transposed_operand():
    lhs, key = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 6, 4)
    matmul = make(lhs, key.transpose(-2, -1), per_head=(True, True))
    with torch.no_grad():
        assert torch.equal(
            matmul(lhs, key.transpose(-2, -1)), matmul(lhs, key.transpose(-2, -1).contiguous())
        )
        assert matmul(lhs[:0], key[:0].transpose(-2, -1)).shape == (0, 3, 5, 6)


def test_switched_off_it_is_the_float_product_bit_for_bit():
    lhs, rhs = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 4, 7)
    matmul = make(lhs, rhs)
    assert not matmul.is_float
    set_enabled(matmul, False)
    assert matmul.is_float

    class FloatProduct(torch.nn.Module):
        def forward(self, a, b):
            return a @ b

    assert all(map(torch.equal, step(matmul, lhs, rhs), step(FloatProduct(), lhs, rhs)))


def test_one_operand_may_be_switched_off():
    lhs, rhs = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 4, 2)
    matmul = make(lhs, rhs)
    matmul.rhs_quantizer.enabled = False
    with torch.no_grad():
        assert torch.equal(matmul(lhs, rhs), matmul.lhs_quantizer(lhs) @ rhs)
    assert not matmul.is_float


def test_observing_is_not_float_even_if_switched_off():
    lhs, rhs = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 4, 2)
    matmul = make(lhs, rhs)
    set_enabled(matmul, False)
    matmul.lhs_quantizer.observer = build_observer(matmul.lhs_quantizer.spec)
    assert not matmul.is_float
    assert torch.equal(matmul(lhs, rhs), lhs @ rhs)
    assert matmul.lhs_quantizer.observer.num_updates == 1


def test_an_uncalibrated_operand_is_an_error():
    matmul = make(torch.randn(1, 1, 3, 4), torch.randn(1, 1, 4, 2))
    matmul.rhs_quantizer.reset()
    with pytest.raises(UncalibratedError), torch.no_grad():
        matmul(torch.randn(1, 1, 3, 4), torch.randn(1, 1, 4, 2))


@pytest.mark.parametrize(('side', 'axis'), [(0, -1), (1, -2)])
def test_a_scale_along_the_summed_axis_is_refused(side, axis):
    operands = [FakeQuantizer(QuantSpec()), FakeQuantizer(QuantSpec())]
    operands[side] = FakeQuantizer(QuantSpec(granularity=PerChannel(axis)), 4)
    with pytest.raises(ValueError, match=f'axis={axis} is summed over.*PerTensor'):
        QuantMatMul(*operands)


def test_gradients_of_both_operands_and_scales():
    lhs, rhs = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 4, 7)
    matmul = make(lhs, rhs, per_head=(True, False))
    _, *grads = step(matmul, lhs, rhs)
    scales = [matmul.lhs_quantizer.scale.grad, matmul.rhs_quantizer.scale.grad]
    assert all(np.isfinite(g.numpy()).all() and g.abs().sum() > 0 for g in (*grads, *scales))
    assert scales[0].shape == (3,) and scales[1].shape == ()


SIZES = [(1, 3, 1, 1, 5), (2, 3, 7, 11, 5), (2, 1, 13, 2, 3), (1, 4, 3, 17, 1), (1, 1, 1, 1, 1)]
LOG = [('log2', 4), ('log2', 3), ('log_sqrt2', 4), ('adalog', 2)]


def make_rows(bits, schemes, shares=(1.0, 1.0), codes='uniform'):
    """Both operands have a scale a vector; the left one may be logarithmic."""
    operands = []
    for side, axis in enumerate((-1, -2)):
        kind = codes if side == 0 else 'uniform'
        spec = QuantSpec(
            bits[side], *schemes[side], granularity=PerRow(axis), learn_scale=True, codes=kind
        )
        quantizer = calibrated(FakeQuantizer(spec), torch.zeros(1))
        quantizer.set_qparams(quantizer.scale * shares[side], quantizer.zero_point)
        operands.append(quantizer)
    return QuantMatMul(*operands)


@given(
    bits=st.tuples(st.integers(2, 8), st.integers(2, 8)),
    schemes=st.tuples(st.sampled_from(SCHEMES), st.sampled_from(SCHEMES)),
    shares=st.tuples(st.floats(0.5, 1.5, width=32), st.floats(0.5, 1.5, width=32)),
    sizes=st.sampled_from(SIZES),
    seed=st.integers(0, 10**6),
)
def test_a_scale_a_vector_is_the_integer_reference_bit_for_bit(bits, schemes, shares, sizes, seed):
    torch.manual_seed(seed)
    batch, heads, n, k, m = sizes
    lhs, rhs = torch.randn(batch, heads, n, k), torch.randn(batch, heads, k, m)
    lhs = lhs * torch.logspace(-3, 2, n)[:, None]
    matmul = make_rows(bits, schemes, shares)
    with torch.no_grad():
        integer = matmul(lhs, rhs)
        assert torch.equal(integer, reference(matmul, lhs, rhs))
    torch.testing.assert_close(matmul(lhs, rhs), integer, rtol=1e-4, atol=1e-4)


@given(
    code=st.sampled_from(LOG),
    bits=st.integers(2, 8),
    scheme=st.sampled_from(SCHEMES),
    rows=st.booleans(),
    tokens=st.sampled_from([1, 2, 17, 131]),
    seed=st.integers(0, 10**6),
)
def test_levels_times_codes_are_the_integer_reference_bit_for_bit(
    code, bits, scheme, rows, tokens, seed
):
    torch.manual_seed(seed)
    p = (torch.randn(2, 3, 5, tokens) * 3).softmax(-1)
    v = torch.randn(2, 3, tokens, 4)
    matmul = make_rows((code[1], bits), ((False, True), scheme), codes=code[0])
    if not rows:
        spec = QuantSpec(code[1], signed=False, codes=code[0])
        matmul.lhs_quantizer = calibrated(FakeQuantizer(spec), p)
    with torch.no_grad():
        integer = matmul(p, v)
        assert torch.equal(integer, reference(matmul, p, v))
    torch.testing.assert_close(matmul(p, v), integer, rtol=1e-4, atol=1e-5)


def test_long_sums_of_levels_stay_exact():
    p, v = torch.rand(1, 1, 2, 4096) + 0.9, torch.rand(1, 1, 4096, 3) + 5
    matmul = make_rows((4, 8), ((False, True), (False, True)), codes='log2')
    quantizers = matmul.lhs_quantizer, matmul.rhs_quantizer
    assert accumulator_dtype(*quantizers, 4096) == torch.float64
    with torch.no_grad():
        assert torch.equal(matmul(p, v), reference(matmul, p, v))


@pytest.mark.parametrize(('side', 'axis'), [(0, -2), (1, -1)])
def test_vectors_along_the_axis_that_is_kept_are_refused(side, axis):
    operands = [FakeQuantizer(QuantSpec()), FakeQuantizer(QuantSpec())]
    operands[side] = FakeQuantizer(QuantSpec(granularity=PerRow(axis)))
    with pytest.raises(
        ValueError, match=rf'scales along the summed axis; write PerRow\(axis={-3 - axis}\)'
    ):
        QuantMatMul(*operands)


@pytest.mark.parametrize('codes', ['uniform', 'log2'])
def test_a_vector_of_zeros_gives_zero_and_finite_gradients(codes):
    lhs, rhs = torch.rand(1, 1, 3, 4), torch.randn(1, 1, 4, 2)
    lhs[..., 1, :] = 0
    rhs[..., 0] = 0
    matmul = make_rows((4, 4), ((False, True), (True, False)), codes=codes)
    out, *grads = step(matmul, lhs, rhs)
    assert (out[..., 1, :] == 0).all() and (out[..., 0] == 0).all()
    scales = [matmul.lhs_quantizer.scale.grad, matmul.rhs_quantizer.scale.grad]
    assert all(torch.isfinite(g).all() for g in (*grads, *scales))
    with torch.no_grad():
        assert torch.equal(matmul(lhs, rhs), reference(matmul, lhs, rhs))
