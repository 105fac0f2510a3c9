# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gplq_mm.quantizers import FakeQuantizer, PerRow, PerTensor, QuantSpec, build_observer
from gplq_mm.quantizers.learned_scale import level_codes_ste
from gplq_mm.quantizers.log_codes import (
    ADALOG_BASES,
    CODES,
    TOP,
    candidate_bases,
    check_codes,
    default_levels,
    log_levels,
    quantize_to_levels,
    thresholds,
    upper_bound,
)

TABLES = [(code, bits) for code in CODES for bits in range(2, 9) if candidate_bases(code, bits)]


def tables():
    """Every table that a quantizer can have."""
    return [
        pytest.param(log_levels(bits, base), base, id=f'{code}-{bits}-{base:.3f}')
        for code, bits in TABLES
        for base in candidate_bases(code, bits)
    ]


@pytest.mark.parametrize(('levels', 'base'), tables())
def test_levels_are_zero_and_powers_of_the_base(levels, base):
    values = levels.double()
    assert levels.dtype == torch.int32 and len(levels) in [2**b for b in range(2, 9)]
    assert values[0] == 0 and (values.diff() > 0).all() and values[-1] <= TOP
    assert math.gcd(*levels.tolist()) == 1
    steps = values[2:] / values[1:-1]
    rounding = 1 / values[1:-1]  # of both levels to integers
    assert ((steps - base).abs() <= base * rounding).all()


@pytest.mark.parametrize(('levels', 'base'), tables())
def test_rounding_is_to_nearest_on_a_logarithmic_axis(levels, base):
    values = levels.double()
    ratio = torch.logspace(
        -2, math.log2(float(values[-1]) * 1.3), 5003, base=2, dtype=torch.float64
    )
    found = quantize_to_levels(ratio.float(), levels).double()
    assert torch.isin(found, values).all()
    positive = values[1:]
    distance = (ratio.log2()[:, None] - positive.log2()).abs()
    nearest = positive[distance.argmin(1)]
    start = float(thresholds(levels)[1])
    near_a_tie = (distance.sort(1).values[:, :2].diff(dim=1) < 1e-5).flatten()
    checked = (ratio > start * (1 + 1e-6)) & ~near_a_tie
    assert torch.equal(found[checked], nearest[checked])
    assert (found[ratio < start * (1 - 1e-6)] == 0).all()


@pytest.mark.parametrize(('levels', 'base'), tables())
def test_the_levels_themselves_stay(levels, base):
    assert torch.equal(quantize_to_levels(levels.float(), levels), levels.float())


@given(
    table=st.sampled_from([t.values[0] for t in tables()]),
    scale=st.floats(2**-20, 8.0, width=32),
    seed=st.integers(0, 10**6),
)
def test_codes_equal_a_search_in_numpy(table, scale, seed):
    x = torch.rand(301, generator=torch.Generator().manual_seed(seed)) * scale * float(table[-1])
    ratio = x.numpy() / np.float32(scale)
    index = np.searchsorted(thresholds(table)[1:].numpy(), ratio, side='left')
    expected = table.numpy().astype(np.int64)[index]
    found = level_codes_ste(x, torch.tensor(scale), table)
    assert np.array_equal(found.numpy().astype(np.int64), expected)


def test_thresholds_are_the_geometric_means_and_belong_to_the_lower_level():
    levels = log_levels(4, 2.0)
    edges = thresholds(levels)
    assert edges[0] == -math.inf
    middle = (levels[1:-1].double() * levels[2:].double()).sqrt().float()
    assert torch.equal(edges[2:], middle)
    assert torch.equal(quantize_to_levels(edges[1:], levels), levels[:-1].float())
    above = torch.nextafter(edges[1:], torch.full((15,), math.inf))
    assert torch.equal(quantize_to_levels(above, levels), levels[1:].float())


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_not_finite_stays_visible(bad):
    found = quantize_to_levels(torch.tensor([1.0, bad, -5.0]), log_levels(3, 2.0))
    assert found.isnan().tolist() == [False, True, False] and found[2] == 0


@pytest.mark.parametrize(
    ('codes', 'bits'), [('log2', 5), ('log2', 8), ('log_sqrt2', 6), ('adalog', 8)]
)
def test_bits_without_a_table_of_integers_are_refused(codes, bits):
    assert not candidate_bases(codes, bits)
    with pytest.raises(ValueError, match=f'{bits}-bit codes of base .*uniform'):
        check_codes(codes, bits)
    with pytest.raises(ValueError, match=f'{bits}-bit codes'):
        QuantSpec(bits, signed=False, codes=codes)


def test_an_unknown_code_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"codes='log10' is unknown; write 'uniform' or one of"):
        check_codes('log10', 4)


@pytest.mark.parametrize(('codes', 'bits'), TABLES)
def test_the_default_table_is_that_of_the_largest_base(codes, bits):
    levels = default_levels(codes, bits)
    assert torch.equal(levels, log_levels(bits, candidate_bases(codes, bits)[-1]))
    assert set(candidate_bases('adalog', bits)) <= set(ADALOG_BASES)


@given(
    code=st.sampled_from(TABLES),
    scale=st.floats(2**-20, 1.0, width=32),
    seed=st.integers(0, 10**6),
)
def test_gradients_are_lsqs_with_the_level_as_the_code(code, scale, seed):
    levels = default_levels(*code)
    generator = torch.Generator().manual_seed(seed)
    top = float(levels[-1])
    x = torch.rand(200, generator=generator, dtype=torch.float64) * scale * top * 2
    grad = torch.randn(200, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    step = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    (level_codes_ste(x, step, levels) * step).backward(grad)
    ratio = x.detach() / scale
    inside = ratio < upper_bound(levels)
    level = quantize_to_levels(ratio, levels)
    assert torch.allclose(x.grad, grad * inside, rtol=1e-12)
    expected = (grad * (level - torch.where(inside, ratio, 0.0))).sum()
    assert torch.allclose(step.grad, expected, rtol=1e-8, atol=1e-8 * top)


def attention_rows(tokens, generator):
    """Probabilities of 32 queries: from a single peak to nearly flat."""
    logits = torch.randn(32, tokens, generator=generator)
    return (logits * torch.linspace(0.1, 8, 32)[:, None]).softmax(-1)


def quantized(x, **options):
    quantizer = FakeQuantizer(QuantSpec(4, signed=False, **options))
    observer = build_observer(quantizer.spec)
    for index in range(observer.num_passes):
        observer.pass_index = index
        observer.observe(x)
    levels = observer.calculate_levels()
    if levels is not None:
        quantizer.set_levels(levels)
    quantizer.set_qparams(*observer.calculate_qparams())
    return quantizer(x)


@pytest.mark.parametrize('observer', ['minmax', 'mse'])
@pytest.mark.parametrize('tokens', [65, 257, 1370, 4096])
def test_long_softmax_rows_lose_less_than_with_one_uniform_scale(tokens, observer):
    generator = torch.Generator().manual_seed(tokens)
    p, v = attention_rows(tokens, generator), torch.randn(tokens, 64, generator=generator)
    exact = p @ v

    def errors(on_grid):
        return (on_grid @ v - exact).norm(dim=1) / exact.norm(dim=1)

    uniform = errors(quantized(p, granularity=PerTensor(), observer=observer))
    rows = errors(quantized(p, granularity=PerRow(-1), codes='log2'))
    assert rows.mean() < 0.5 * uniform.mean()
    assert (rows[:8] < uniform[:8]).all()  # flat rows: one scale rounds them to 0
    assert rows.max() < 0.5
