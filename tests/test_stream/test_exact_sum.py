# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gplq_mm.stream.exact_sum import ExactSum, FixedPointSum

TERMS = st.lists(st.floats(-1e9, 1e9, allow_nan=False), min_size=1, max_size=20)


def summed(terms: list[float]) -> ExactSum:
    total = ExactSum((1,), torch.device('cpu'))
    for term in terms:
        total.add(torch.tensor([term], dtype=torch.float64))
    return total


@settings(max_examples=50, deadline=None)
@given(terms=TERMS, seed=st.randoms())
def test_the_order_of_the_terms_does_not_change_a_bit(terms, seed):
    shuffled = list(terms)
    seed.shuffle(shuffled)
    assert torch.equal(summed(terms).value(), summed(shuffled).value())


@settings(max_examples=50, deadline=None)
@given(terms=TERMS, cut=st.integers(0, 20))
def test_shares_of_ranks_add_to_the_sum_of_one(terms, cut):
    one, first, second = summed(terms), summed(terms[:cut]), summed(terms[cut:])
    first.parts += second.parts
    assert torch.equal(first.value(), one.value())


@settings(max_examples=50, deadline=None)
@given(terms=TERMS)
def test_the_sum_is_that_of_the_rationals(terms):
    exact = float(sum(map(Fraction, terms)))
    assert summed(terms).value().item() == pytest.approx(exact, rel=1e-15, abs=1e-15)


SMALL = st.lists(st.floats(-100, 100, allow_nan=False, width=32), min_size=1, max_size=20)


@settings(max_examples=50, deadline=None)
@given(terms=SMALL, seed=st.randoms())
def test_a_fixed_point_sum_has_no_order_and_is_near_that_of_the_rationals(terms, seed):
    sums = []
    for order in (terms, seed.sample(terms, len(terms))):
        total = FixedPointSum((1,), torch.device('cpu'))
        for term in order:
            total.add(torch.tensor([term]))
        total.reduce()
        sums.append(total.value())
    assert torch.equal(*sums)
    assert abs(Fraction(float(sums[0])) - sum(map(Fraction, terms))) <= len(terms) * 2**-41
    total.clear()
    assert not total.value().any()
