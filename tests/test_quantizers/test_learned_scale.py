# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gplq_mm.quantizers.fake_quantizer import lsq_grad_factor
from gplq_mm.quantizers.functional import SCALE_EPS
from gplq_mm.quantizers.learned_scale import (
    centered_codes_ste,
    fake_quantize_ste,
    positive_scale_ste,
    scale_gradient,
)
from tests.helpers.reference import bounds


def product_rule(x, scale, zero_point, low, high):
    """Values by way of codes: autograd's product rule adds the scale's own part."""
    return centered_codes_ste(x, scale, zero_point, low, high) * scale


FORMS = [fake_quantize_ste, product_rule]


def paper_gradients(x, scale, zero_point, low, high, grad):
    """LSQ, equations 3 and 5, in float64; -Q_N and Q_P are the bounds seen from real zero."""
    ratio = x / scale
    bottom, top = low - zero_point, high - zero_point
    inside = (bottom < ratio) & (ratio < top)
    slope = np.where(inside, np.rint(ratio) - ratio, np.where(ratio >= top, top, bottom))
    grad_scale = (grad * slope).sum(
        axis=tuple(i for i in range(x.ndim) if scale.shape[i] == 1), keepdims=True
    )
    return grad * inside, grad_scale


@pytest.mark.parametrize('form', FORMS)
@given(
    bits=st.integers(2, 8),
    signed=st.booleans(),
    axis=st.sampled_from([None, 0, 1, -1]),
    shape=st.sampled_from([(1, 1, 1), (2, 3, 5), (4, 1, 7), (3, 11, 2)]),
    spread=st.floats(0.1, 3.0),
    seed=st.integers(0, 10**6),
)
def test_gradients_are_the_papers(form, bits, signed, axis, shape, spread, seed):
    low, high = bounds(bits, signed)
    rng = torch.Generator().manual_seed(seed)
    scale_shape = [1] * len(shape)
    if axis is not None:
        scale_shape[axis] = shape[axis]
    scale = torch.rand(scale_shape, generator=rng, dtype=torch.float64) + 0.05
    zero_point = torch.randint(low, high + 1, scale_shape, generator=rng).double()
    x = torch.randn(shape, generator=rng, dtype=torch.float64) * spread * high * scale
    grad = torch.randn(shape, generator=rng, dtype=torch.float64)
    expected = paper_gradients(
        *(t.numpy() for t in (x, scale, zero_point)), low, high, grad.numpy()
    )
    x.requires_grad_(), scale.requires_grad_()
    form(x, scale, zero_point, low, high).backward(grad)
    assert np.allclose(x.grad.numpy(), expected[0], rtol=1e-12, atol=1e-12)
    assert np.allclose(scale.grad.numpy(), expected[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('form', FORMS)
def test_the_half_step_beyond_a_bound_is_already_clipped(form):
    x = torch.tensor([7.3, -8.3, 7.0, 6.9], requires_grad=True)
    scale = torch.tensor(1.0, requires_grad=True)
    form(x, scale, torch.tensor(0.0), -8, 7).sum().backward()
    assert x.grad.tolist() == [0, 0, 0, 1]
    assert scale.grad.item() == pytest.approx(7 - 8 + 7 + (7 - 6.9), abs=1e-5)


def test_both_forms_give_the_same_values_in_float32():
    x, scale, zero_point = torch.randn(4, 33), torch.rand(4, 1) + 0.1, torch.ones(4, 1)
    assert torch.equal(*(form(x, scale, zero_point, -8, 7) for form in FORMS))


@pytest.mark.parametrize('form', FORMS)
def test_differentiating_twice_is_an_error(form):
    x = torch.randn(3, requires_grad=True)
    scale = torch.tensor(0.2, requires_grad=True)
    out = form(x, scale, torch.tensor(0.0), -8, 7).square().sum()
    (grad,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(RuntimeError, match='cannot be differentiated twice'):
        grad.sum().backward()


@pytest.mark.parametrize('form', FORMS)
def test_an_empty_tensor_has_zero_gradients(form):
    x = torch.zeros(0, 3, requires_grad=True)
    scale = torch.ones(3, requires_grad=True)
    form(x, scale, torch.zeros(3), -8, 7).sum().backward()
    assert x.grad.shape == (0, 3) and scale.grad.tolist() == [0, 0, 0]


@pytest.mark.parametrize('form', FORMS)
def test_a_frozen_scale_gets_no_gradient_and_a_frozen_input_neither(form):
    x, scale = torch.randn(5), torch.tensor(0.3, requires_grad=True)
    form(x, scale, torch.tensor(0.0), -8, 7).sum().backward()
    assert x.grad is None and scale.grad is not None
    x.requires_grad_()
    frozen = scale.detach()
    form(x, frozen, torch.tensor(0.0), -8, 7).sum().backward()
    assert x.grad is not None and frozen.grad is None


@pytest.mark.parametrize(
    ('numel', 'scales', 'qmax', 'expected'),
    [(700, 1, 7, 1 / 4900**0.5), (700, 10, 7, 1 / 490**0.5), (64, 1, 15, 1 / 960**0.5)],
)
def test_gradient_factor(numel, scales, qmax, expected):
    assert lsq_grad_factor(numel, scales, qmax) == pytest.approx(expected)


def test_gradient_factor_of_an_empty_tensor_is_finite():
    assert lsq_grad_factor(0, 1, 7) == pytest.approx(1 / 7**0.5)


def test_scale_gradient_is_the_identity_forwards():
    x = torch.randn(4, requires_grad=True)
    y = scale_gradient(x, 0.25)
    y.sum().backward()
    assert torch.equal(x, y) and x.grad.tolist() == [0.25] * 4


def test_positive_scale_passes_its_gradient_below_the_bound():
    scale = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    bounded = positive_scale_ste(scale)
    bounded.sum().backward()
    assert bounded.tolist() == pytest.approx([SCALE_EPS, SCALE_EPS, 2.0])
    assert scale.grad.tolist() == [1, 1, 1]


@pytest.mark.parametrize('start', [-0.05, 0.0, 1e-12])
def test_a_scale_that_became_too_small_recovers(start):
    x = torch.randn(512)
    scale = torch.tensor(start, requires_grad=True)
    optimizer = torch.optim.Adam([scale], lr=0.02)
    for _ in range(40):
        step = scale_gradient(positive_scale_ste(scale), lsq_grad_factor(512, 1, 7))
        error = (fake_quantize_ste(x, step, torch.tensor(0.0), -8, 7) - x).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    assert scale.item() > 0.1 and error.item() < 0.05
