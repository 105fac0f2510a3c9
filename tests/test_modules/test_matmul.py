# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gplq_mm.modules import QuantMatMul
from gplq_mm.modules.exact import accumulator_dtype
from gplq_mm.quantizers import (
    FakeQuantizer,
    PerChannel,
    PerTensor,
    QuantSpec,
    UncalibratedError,
    build_observer,
)
from tests.helpers.layers import set_enabled, step
from tests.helpers.reference import SCHEMES, calibrated, centred, rescale


def make(lhs, rhs, bits=(4, 4), schemes=((True, False), (False, True)), per_head=(False, False)):
    operands = []
    for x, num_bits, scheme, heads in zip((lhs, rhs), bits, schemes, per_head, strict=True):
        granularity = PerChannel(1) if heads else PerTensor()
        spec = QuantSpec(num_bits, *scheme, granularity=granularity, learn_scale=True)
        operands.append(calibrated(FakeQuantizer(spec, x.shape[1] if heads else None), x))
    return QuantMatMul(*operands)


def reference(matmul, lhs, rhs):
    scales = [
        q.scale.detach() if q.scale.dim() == 0 else q.scale.detach().view(1, -1, 1, 1)
        for q in (matmul.lhs_quantizer, matmul.rhs_quantizer)
    ]
    total = centred(matmul.lhs_quantizer, lhs) @ centred(matmul.rhs_quantizer, rhs)
    return rescale(total, (scales[0] * scales[1]).numpy(), None)


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

    class Product(torch.nn.Module):
        def forward(self, a, b):
            return a @ b

    assert all(map(torch.equal, step(matmul, lhs, rhs), step(Product(), lhs, rhs)))


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
