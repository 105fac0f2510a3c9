# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import math

import numpy as np
import pytest
import torch

from gplq_mm.ptq.corrections.least_squares import NormalEquations

C = 4


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 10, C, generator=generator)
    weight = torch.randn(C, C, generator=generator)
    noise = torch.randn(x.shape, generator=generator) * 0.1
    return x, x @ weight.T + 0.5 + noise


def equations(x, residual):
    found = NormalEquations(C, torch.device('cpu'))
    found.add(x, residual)
    return found


def test_the_solution_without_penalty_is_numpys(data):
    x, residual = data
    weight, bias, freedom = equations(x, residual).solve(0.0)
    rows = np.concatenate([x.reshape(-1, C), np.ones((60, 1))], 1).astype(np.float64)
    wanted = np.linalg.lstsq(rows, residual.reshape(-1, C).double().numpy(), rcond=None)[0]
    np.testing.assert_allclose(weight.T, wanted[:C], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(bias, wanted[C], rtol=1e-5, atol=1e-6)
    assert freedom == pytest.approx(C + 1)


def test_the_error_is_that_of_the_residuals(data):
    x, residual = data
    found = equations(x, residual)
    weight, bias, _ = found.solve(0.1)
    error = (residual - x @ weight.T - bias).double().square().mean()
    assert found.mse(weight, bias) == pytest.approx(float(error), rel=1e-6)
    assert found.mse() == pytest.approx(float(residual.double().square().mean()), rel=1e-9)
    assert (found.images, found.tokens, found.is_finite) == (6, 60, True)


def test_a_penalty_shrinks_the_weight_and_the_degrees_of_freedom(data):
    weights, freedoms = [], []
    for ridge in (0.0, 0.1, 10.0):
        weight, _, freedom = equations(*data).solve(ridge)
        weights.append(float(weight.norm()))
        freedoms.append(freedom)
    assert weights == sorted(weights, reverse=True)
    assert freedoms == sorted(freedoms, reverse=True)


def test_the_split_into_batches_does_not_change_a_bit(data):
    x, residual = data
    parts = NormalEquations(C, torch.device('cpu'))
    for index in (3, 0, 5, 1, 4, 2):
        parts.add(x[index : index + 1], residual[index : index + 1])
    for got, want in zip(parts.solve(0.1), equations(x, residual).solve(0.1), strict=True):
        assert torch.equal(torch.as_tensor(got), torch.as_tensor(want))


def test_a_constant_channel_gets_no_weight(data):
    x, residual = data
    x[..., 2] = 3.0
    weight, bias, _ = equations(x, residual).solve(0.0)
    assert weight[:, 2].abs().max() == 0
    assert bias.isfinite().all()


def test_the_expected_error_grows_with_the_degrees_of_freedom(data):
    found = equations(*data)
    assert found.expected_mse(1.0, 0.0) == 1.0
    assert found.expected_mse(1.0, 30.0) == pytest.approx(4.0)
    assert found.expected_mse(1.0, 60.0) == math.inf


def test_nan_in_a_token_is_noticed(data):
    x, residual = data
    x[0, 0, 0] = float('nan')
    assert not equations(x, residual).is_finite
