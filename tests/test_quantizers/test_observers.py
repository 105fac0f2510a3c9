# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from gplq_mm.quantizers import (
    OBSERVERS,
    PerChannel,
    PerRow,
    PerTensor,
    QuantSpec,
    build_observer,
    dequantize,
    qparams_from_range,
    quantize,
)
from gplq_mm.quantizers.log_codes import (
    ADALOG_BASES,
    candidate_bases,
    log_levels,
    quantize_to_levels,
)
from gplq_mm.quantizers.observers import LogObserver, RowObserver
from gplq_mm.quantizers.range_search import quantization_error
from gplq_mm.quantizers.spec import rows_by_scale
from tests.helpers.reference import SCHEMES, bounds

GRANULARITIES = [PerTensor(), PerChannel(-1), PerChannel(1), PerChannel(0)]


def images(count=4, shape=(2, 3, 5, 6)):
    """Tensors of different spread, one a calibration image, non-contiguous."""
    return [(torch.randn(shape) * (i + 1)).transpose(-1, -2) for i in range(count)]


def run(spec, tensors):
    observer = build_observer(spec)
    for index in range(observer.num_passes):
        observer.pass_index = index
        for x in tensors:
            observer.observe(x)
    return observer


def rows_of(spec, tensors):
    return torch.cat([rows_by_scale(spec.granularity, x) for x in tensors], 1)


def error(rows, qparams, spec):
    return quantization_error(rows, None, *qparams, spec.quant_range)


@given(
    st.integers(2, 8),
    st.sampled_from(SCHEMES),
    st.floats(-100, 100, width=32),
    st.floats(0, 100, width=32),
)
def test_a_range_is_covered_within_half_a_step(bits, scheme, lo, length):
    spec = QuantSpec(bits, *scheme)
    low, high = spec.quant_range
    ends = torch.tensor([lo]), torch.tensor([lo + length])
    scale, zero_point = qparams_from_range(*ends, spec)
    assert scale > 0 and low <= zero_point <= high and zero_point == zero_point.round()
    assert not spec.symmetric or zero_point == 0
    start = max(lo, 0) if scheme == (False, True) else lo
    assume(lo + length >= start)
    x = torch.linspace(start, lo + length, 101)
    back = dequantize(quantize(x, scale, zero_point, low, high), scale, zero_point)
    assert ((back - x).abs() <= scale * 0.5001 + 1e-6).all()
    assert quantize(torch.zeros(1), scale, zero_point, low, high) == zero_point


@pytest.mark.parametrize('granularity', GRANULARITIES)
def test_minmax_is_the_smallest_and_largest_value(granularity):
    spec, tensors = QuantSpec(4, symmetric=False, granularity=granularity), images()
    rows = rows_of(spec, tensors)
    expected = qparams_from_range(rows.amin(1), rows.amax(1), spec)
    assert all(map(torch.equal, run(spec, tensors).calculate_qparams(), expected))


def test_moving_average_follows_the_formula():
    spec = QuantSpec(4, observer='moving_average', observer_args={'momentum': 0.25})
    tensors = images()
    lo, hi = tensors[0].min(), tensors[0].max()
    for x in tensors[1:]:
        lo, hi = 0.75 * lo + 0.25 * x.min(), 0.75 * hi + 0.25 * x.max()
    scale, zero_point = run(spec, tensors).calculate_qparams()
    assert torch.allclose(scale, torch.maximum(hi / 7, -lo / 8)) and zero_point == 0


@pytest.mark.parametrize('granularity', GRANULARITIES[:2])
@pytest.mark.parametrize('percentile', [0.9, 0.99, 1.0])
def test_percentile_is_numpys_within_a_bin(granularity, percentile):
    args = {'percentile': percentile, 'bins': 1000}
    spec = QuantSpec(
        8, symmetric=False, granularity=granularity, observer='percentile', observer_args=args
    )
    tensors = images(shape=(8, 16, 5, 6))
    rows = rows_of(spec, tensors).numpy()
    ends = np.quantile(rows, [1 - percentile, percentile], axis=1, method='inverted_cdf')
    scale = run(spec, tensors).calculate_qparams()[0].numpy()
    one_bin = (rows.max(1) - rows.min(1)) / 1000
    assert (np.abs(scale * 255 - (ends[1] - ends[0])) <= 2.01 * one_bin).all()


@pytest.mark.parametrize('percentile', [0.5, 0.0, 1.01, -1])
def test_percentile_outside_its_range_is_refused(percentile):
    spec = QuantSpec(observer='percentile', observer_args={'percentile': percentile})
    with pytest.raises(ValueError, match=r'percentile=.* is not in \(0.5, 1\]; write'):
        build_observer(spec)


@pytest.mark.parametrize('granularity', GRANULARITIES[:2])
@pytest.mark.parametrize('scheme', [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize('bits', [2, 3, 4, 8])
def test_mse_is_better_than_minmax_and_near_the_best(granularity, scheme, bits):
    tensors = images()
    spec = QuantSpec(bits, *scheme, granularity=granularity, observer='mse')
    rows = rows_of(spec, tensors)
    found = error(rows, run(spec, tensors).calculate_qparams(), spec)
    lo, hi = rows.amin(1), rows.amax(1)
    factors = torch.linspace(0.05, 1, 25)
    pairs = [(f, f) for f in factors] if spec.symmetric else torch.cartesian_prod(factors, factors)
    grid = torch.stack(
        [error(rows, qparams_from_range(lo * a, hi * b, spec), spec) for a, b in pairs]
    )
    assert (found <= grid[-1] * 1.001).all()  # the last pair is the whole range
    assert (found <= grid.amin(0) * 1.05).all()


@pytest.mark.parametrize('observer', ['percentile', 'mse'])
@pytest.mark.parametrize('size', [1e-7, 1e-6, 1e5])
def test_a_histogram_fits_ranges_of_any_size(observer, size):
    spec = QuantSpec(4, symmetric=False, observer=observer)
    x = torch.rand(4, 500) - 0.3
    scale = run(spec, [x * size]).calculate_qparams()[0]
    assert torch.allclose(scale / size, run(spec, [x]).calculate_qparams()[0], rtol=0.02)


@pytest.mark.parametrize('observer', sorted(OBSERVERS))
@pytest.mark.parametrize('scheme', SCHEMES)
def test_a_dead_channel_gets_scale_one(observer, scheme):
    x = torch.randn(6, 3)
    x[:, 1] = 0
    spec = QuantSpec(4, *scheme, granularity=PerChannel(-1), observer=observer)
    scale, zero_point = run(spec, [x]).calculate_qparams()
    assert scale.shape == zero_point.shape == (3,)
    assert scale[1] == 1 and (scale[[0, 2]] != 1).all()


@pytest.mark.parametrize('observer', sorted(OBSERVERS))
def test_a_constant_tensor_is_represented(observer):
    spec = QuantSpec(8, symmetric=False, observer=observer)
    qparams = run(spec, [torch.full((5, 5), 3.0)]).calculate_qparams()
    value = dequantize(quantize(torch.tensor(3.0), *qparams, *spec.quant_range), *qparams)
    assert value.item() == pytest.approx(3.0, abs=0.02)


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), float('-inf')])
@pytest.mark.parametrize('observer', sorted(OBSERVERS))
def test_nan_and_infinity_are_refused(observer, bad):
    x = torch.ones(3, 3)
    x[1, 2] = bad
    with pytest.raises(ValueError, match='NaN or infinity'):
        build_observer(QuantSpec(observer=observer)).observe(x)


@pytest.mark.parametrize('observer', sorted(OBSERVERS))
def test_empty_tensors_are_ignored(observer):
    spec = QuantSpec(granularity=PerChannel(-1), observer=observer)
    tensors = images()
    with_empty = [torch.zeros(0, 5), *tensors, torch.zeros(2, 0, 5)]
    a, b = run(spec, tensors), run(spec, with_empty)
    assert a.num_updates == b.num_updates
    assert all(map(torch.equal, a.calculate_qparams(), b.calculate_qparams()))


@pytest.mark.parametrize('observer', sorted(OBSERVERS))
def test_a_pass_that_another_observer_asked_for_changes_nothing(observer):
    spec, tensors = QuantSpec(4, observer=observer), images()
    a, b = run(spec, tensors), run(spec, tensors)
    b.pass_index = b.num_passes
    b.observe(tensors[0] * 100)
    assert all(map(torch.equal, a.calculate_qparams(), b.calculate_qparams()))


@pytest.mark.parametrize('observer', sorted(OBSERVERS))
def test_observing_keeps_no_graph_and_takes_half_precision(observer):
    x = torch.randn(4, 5, requires_grad=True)
    spec = QuantSpec(4, observer=observer)
    assert not run(spec, [x]).calculate_qparams()[0].requires_grad
    half = run(spec, [x.bfloat16()]).calculate_qparams()[0]
    assert half.dtype == torch.float32
    assert torch.equal(half, run(spec, [x.bfloat16().float()]).calculate_qparams()[0])


def reduce(observers):
    """Combine what ranks hold, as each observer's table says (image order round robin)."""
    for name, how in observers[0].reductions.items():
        values = [getattr(o, name) for o in observers]
        if how == 'gather':
            longest = max(map(len, values))
            merged = [v[i] for i in range(longest) for v in values if i < len(v)]
        else:
            rows = 5 if observers[0].spec.granularity == PerChannel(-1) else 1
            device = torch.device('cpu')
            filled = [observers[0].neutral(how, rows, device) if v is None else v for v in values]
            combine = {'min': torch.amin, 'max': torch.amax, 'sum': torch.sum}[how]
            merged = combine(torch.stack(filled), 0)
        for observer in observers:
            setattr(observer, name, merged)


@pytest.mark.parametrize('observer', sorted(OBSERVERS))
@pytest.mark.parametrize('granularity', GRANULARITIES[:2])
@pytest.mark.parametrize(('ranks', 'count'), [(2, 5), (3, 7), (3, 2)])
def test_shares_reduce_to_the_statistics_of_the_union(observer, granularity, ranks, count):
    spec, tensors = QuantSpec(3, granularity=granularity, observer=observer), images(count)
    shares = [build_observer(spec) for _ in range(ranks)]
    for index in range(shares[0].num_passes):
        for rank, share in enumerate(shares):
            share.pass_index = index
            for x in tensors[rank::ranks]:
                share.observe(x)
        reduce(shares)
    expected = run(spec, tensors).calculate_qparams()
    for share in shares:
        assert all(map(torch.equal, share.calculate_qparams(), expected))


def test_every_observer_declares_exact_reductions():
    for name in OBSERVERS:
        observer = build_observer(QuantSpec(observer=name))
        for index in range(observer.num_passes):
            observer.pass_index = index
            assert observer.reductions
            assert set(observer.reductions.values()) <= {'min', 'max', 'sum', 'gather'}


def test_an_unknown_observer_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"observer='typo' is unknown; write one of \['minmax', "):
        build_observer(QuantSpec(observer='typo'))


@pytest.mark.parametrize('observer', sorted(OBSERVERS))
@pytest.mark.parametrize('bits', range(2, 9))
@pytest.mark.parametrize('scheme', SCHEMES)
def test_row_scales_are_the_same_whatever_was_observed(scheme, bits, observer):
    spec = QuantSpec(bits, *scheme, granularity=PerRow(-1), observer=observer)
    low, high = bounds(bits, scheme[0])
    for tensors in (images(), [x * 100 for x in images(1)]):
        found = run(spec, tensors)
        assert type(found) is RowObserver and found.num_passes == 1
        scale, zero_point = found.calculate_qparams()
        assert scale.item() == pytest.approx(1 / (high if scheme[1] else high - low))
        assert zero_point.item() == 0 and found.calculate_levels() is None


def log_spec(codes='log2', bits=4, granularity=PerTensor()):  # noqa: B008
    return QuantSpec(bits, signed=False, granularity=granularity, codes=codes)


def probabilities(count=4, sharpness=3.0):
    return [(torch.randn(2, 3, 5, 33) * sharpness).softmax(-1) for _ in range(count)]


@pytest.mark.parametrize(
    ('codes', 'bits'), [('log2', 2), ('log2', 4), ('log_sqrt2', 4), ('auto', 3)]
)
def test_the_largest_probability_seen_has_the_largest_level(codes, bits):
    spec, tensors = log_spec(codes, bits), probabilities()
    observer = run(spec, tensors)
    levels = observer.calculate_levels()
    scale, zero_point = observer.calculate_qparams()
    assert type(observer) is LogObserver and zero_point.item() == 0
    assert torch.equal(levels, log_levels(bits, candidate_bases(spec.log_code, bits)[-1]))
    top = max(x.max() for x in tensors)
    assert scale.item() * int(levels[-1]) == pytest.approx(top.item())


@pytest.mark.parametrize('codes', ['log2', 'adalog'])
def test_a_row_of_logarithmic_codes_covers_its_largest_value(codes):
    observer = run(log_spec(codes, granularity=PerRow(-1)), probabilities())
    scale, _ = observer.calculate_qparams()
    assert scale.item() == pytest.approx(1 / int(observer.calculate_levels()[-1]))


@pytest.mark.parametrize('bits', [2, 3, 4])
@pytest.mark.parametrize('granularity', [PerTensor(), PerRow(-1)])
@pytest.mark.parametrize('sharpness', [0.3, 1.0, 3.0, 8.0])
def test_the_searched_base_is_within_a_bin_of_the_best(sharpness, granularity, bits):
    tensors = probabilities(8, sharpness)
    found = run(log_spec('adalog', bits, granularity), tensors).calculate_levels()
    x = torch.cat([t.flatten(0, -2) for t in tensors]).double()
    top = x.max() if granularity == PerTensor() else x.amax(-1, keepdim=True)
    if granularity != PerTensor():  # error in units of the row's largest value, as observed
        x, top = x / top, torch.ones(())

    def squared_error(levels):
        scale = top / int(levels[-1])
        return float((quantize_to_levels(x / scale, levels) * scale - x).square().sum())

    candidates = {b: squared_error(log_levels(bits, b)) for b in candidate_bases('adalog', bits)}
    assert set(candidates) <= set(ADALOG_BASES) and len(candidates) > 1
    assert squared_error(found) <= min(candidates.values()) * 1.05


def test_flat_rows_get_a_smaller_base_than_values_of_all_sizes():
    near_one = [0.4 + 0.6 * torch.rand(64, 64)]
    wide = [torch.exp2(-14 * torch.rand(64, 64)) ** 2]
    tables = [run(log_spec('adalog', 3), x).calculate_levels() for x in (near_one, wide)]
    quotients = [float(t[-1]) / float(t[-2]) for t in tables]
    assert quotients[0] < quotients[1]


def test_logarithmic_codes_refuse_scales_a_channel():
    with pytest.raises(ValueError, match="codes='log2' have one scale per tensor or per row"):
        build_observer(log_spec(granularity=PerChannel(1)))


@pytest.mark.parametrize('codes', ['log2', 'adalog'])
@pytest.mark.parametrize('granularity', [PerTensor(), PerRow(-1)])
@pytest.mark.parametrize(('ranks', 'count'), [(2, 5), (3, 2)])
def test_shares_of_probabilities_reduce_to_those_of_the_union(codes, granularity, ranks, count):
    spec, tensors = log_spec(codes, granularity=granularity), probabilities(count)
    shares = [build_observer(spec) for _ in range(ranks)]
    for rank, share in enumerate(shares):
        for x in tensors[rank::ranks]:
            share.observe(x)
    reduce(shares)
    expected = run(spec, tensors)
    for share in shares:
        assert all(map(torch.equal, share.calculate_qparams(), expected.calculate_qparams()))
        assert torch.equal(share.calculate_levels(), expected.calculate_levels())


@pytest.mark.parametrize('spec', [log_spec(), log_spec('adalog', granularity=PerRow(-1))])
@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_nan_and_infinity_are_refused_by_logarithmic_codes(spec, bad):
    x = torch.ones(3, 3)
    x[1, 2] = bad
    with pytest.raises(ValueError, match='NaN or infinity'):
        build_observer(spec).observe(x)


@pytest.mark.parametrize('granularity', [PerTensor(), PerRow(-1)])
def test_probabilities_of_zero_and_no_images_do_no_harm(granularity):
    observer = run(
        log_spec('adalog', granularity=granularity), [torch.zeros(0, 4), torch.zeros(3, 4)]
    )
    scale, _ = observer.calculate_qparams()
    assert scale > 0 and torch.isfinite(scale) and observer.num_updates == 1
