# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gplq_mm.quantizers import QuantSpec, qparams_from_range, range_search
from gplq_mm.quantizers.range_search import quantization_error, search_range

DISTRIBUTIONS = {
    'normal': lambda: torch.randn(1500),
    'gelu': lambda: F.gelu(torch.randn(1500) * 2),
    'softmax': lambda: torch.randn(15, 100).mul(3).softmax(-1).flatten(),
    'heavy tail': lambda: torch.distributions.StudentT(2.0).sample((1500,)),
    'outliers': lambda: torch.cat([torch.randn(1500), torch.tensor([50.0, -30.0])]),
}
SCHEMES = [(True, True), (False, True), (True, False)]


def error_of(values, lo, hi, spec, weight=None):
    qparams = qparams_from_range(lo, hi, spec)
    return quantization_error(values, weight, *qparams, spec.quant_range)


def search(values, spec, weight=None):
    return search_range(
        values,
        weight,
        values.amin(1),
        values.amax(1),
        lambda a, b: qparams_from_range(a, b, spec),
        spec.quant_range,
    )


def brute_force(values, spec):
    """Least error over a dense grid of both ends of the range."""
    lo, hi = values.amin(1), values.amax(1)
    factors = torch.logspace(-2, 0, 30)
    pairs = [(f, f) for f in factors] if spec.symmetric else torch.cartesian_prod(factors, factors)
    return min(error_of(values, lo * a, hi * b, spec).item() for a, b in pairs)


@pytest.mark.parametrize('name', DISTRIBUTIONS)
@pytest.mark.parametrize(('signed', 'symmetric'), SCHEMES)
@pytest.mark.parametrize('bits', [2, 4])
def test_as_good_as_brute_force(name, signed, symmetric, bits):
    values = DISTRIBUTIONS[name]()[None]
    spec = QuantSpec(bits, signed, symmetric)
    found = error_of(values, *search(values, spec), spec).item()
    assert found <= 1.03 * brute_force(values, spec)


@settings(max_examples=25)
@given(
    bits=st.integers(2, 8),
    scheme=st.sampled_from(SCHEMES),
    shape=st.sampled_from([(1, 1), (3, 17), (2, 101)]),
    shift=st.floats(-3, 3),
    seed=st.integers(0, 10**6),
)
def test_never_worse_than_the_full_range(bits, scheme, shape, shift, seed):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + shift
    spec = QuantSpec(bits, *scheme)
    full = error_of(values, values.amin(1), values.amax(1), spec)
    assert (error_of(values, *search(values, spec), spec) <= full).all()


def test_rows_are_searched_independently_and_in_blocks(monkeypatch):
    values = torch.randn(5, 64) * torch.tensor([1.0, 10.0, 0.1, 3.0, 1e-3])[:, None]
    weight = torch.rand(5, 64)
    spec = QuantSpec(3, symmetric=False)
    together = torch.stack(search(values, spec, weight))
    alone = [torch.stack(search(values[i : i + 1], spec, weight[i : i + 1])) for i in range(5)]
    assert torch.equal(together, torch.cat(alone, 1))
    monkeypatch.setattr(range_search, '_ROW_BUDGET', 130)
    assert torch.equal(together, torch.stack(search(values, spec, weight)))


def test_a_weight_counts_like_repetition():
    values = torch.randn(1, 40)
    counts = torch.randint(1, 4, (1, 40))
    repeated = values[0].repeat_interleave(counts[0])[None]
    spec = QuantSpec(3)
    lo, hi = values.amin(1), values.amax(1)
    weighted = error_of(values, lo, hi, spec, counts.float())
    assert torch.allclose(weighted, error_of(repeated, lo, hi, spec))


def test_the_arguments_are_left_alone():
    values = torch.randn(2, 30)
    lo, hi = values.amin(1), values.amax(1)
    kept = lo.clone(), hi.clone(), values.clone()
    spec = QuantSpec(2)
    search_range(
        values, None, lo, hi, lambda a, b: qparams_from_range(a, b, spec), spec.quant_range
    )
    assert all(torch.equal(a, b) for a, b in zip((lo, hi, values), kept, strict=True))
