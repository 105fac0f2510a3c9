# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import itertools

import pytest
import torch

from gplq_mm.ops.backends.exact import FLOAT32_EXACT, accumulator_bound, accumulator_dtype, max_code
from gplq_mm.quantizers import FakeQuantizer, PerRow, QuantSpec
from gplq_mm.quantizers.log_codes import candidate_bases, log_levels
from tests.helpers.reference import BITS, SCHEMES, bounds


def quantizer(bits=4, scheme=(True, True), active=True):
    q = FakeQuantizer(QuantSpec(bits, *scheme))
    if active:
        q.set_qparams(torch.tensor(0.1), torch.tensor(0.0))
    return q


def largest_centred_code(bits, scheme):
    low, high = bounds(bits, scheme[0])
    zero_points = [0] if scheme[1] else range(low, high + 1)
    return max(abs(code - z) for z in zero_points for code in (low, high))


@pytest.mark.parametrize('schemes', list(itertools.product(SCHEMES, SCHEMES)))
@pytest.mark.parametrize('bits', [(2, 2), (4, 8), (8, 8)])
def test_the_bound_is_the_worst_case(bits, schemes):
    lhs, rhs = (quantizer(b, s) for b, s in zip(bits, schemes, strict=True))
    expected = 1
    for b, s in zip(bits, schemes, strict=True):
        expected *= largest_centred_code(b, s)
    assert accumulator_bound(lhs, rhs, 7) == 7 * expected


@pytest.mark.parametrize('bits', BITS)
def test_float32_is_used_exactly_while_it_holds_the_worst_sum(bits):
    lhs, rhs = quantizer(bits, (False, False)), quantizer(8)
    depth = FLOAT32_EXACT // ((2**bits - 1) * 128)
    assert accumulator_dtype(lhs, rhs, depth) == torch.float32
    assert accumulator_dtype(lhs, rhs, depth + 1) == torch.float64


@pytest.mark.parametrize('codes', [('log2', 2), ('log2', 4), ('log_sqrt2', 4), ('adalog', 4)])
def test_the_bound_of_levels_is_the_largest_of_any_table(codes):
    spec = QuantSpec(codes[1], signed=False, granularity=PerRow(-1), codes=codes[0])
    lhs, rhs = FakeQuantizer(spec), quantizer(4)
    tables = [log_levels(codes[1], base) for base in candidate_bases(*codes)]
    assert max_code(lhs) == max(int(levels.max()) for levels in tables)
    for levels in tables:
        lhs.set_levels(levels)
        depth = FLOAT32_EXACT // (max_code(lhs) * 8)
        assert accumulator_dtype(lhs, rhs, depth) == torch.float32
        assert accumulator_dtype(lhs, rhs, depth + 1) == torch.float64


@pytest.mark.parametrize('scheme', SCHEMES)
@pytest.mark.parametrize('bits', BITS)
def test_the_bound_of_row_codes_is_that_of_any_zero_point(bits, scheme):
    rows = FakeQuantizer(QuantSpec(bits, *scheme, granularity=PerRow(-1)))
    assert max_code(rows) == largest_centred_code(bits, scheme)
    rows.set_qparams(torch.tensor(0.1), torch.tensor(0.0))
    codes, _ = rows.codes((torch.randn(64, 33) * 100).round())
    assert codes.abs().max() <= max_code(rows)
