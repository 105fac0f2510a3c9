# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import itertools
import random

import pytest
import torch

from gplq_mm.analysis import bit_assignment
from gplq_mm.analysis.bit_assignment import (
    Choice,
    Product,
    assign_bits,
    monotone,
    product_groups,
    size_groups,
    total_cost,
    uniform_plans,
)
from gplq_mm.analysis.bit_search import joint_increase, search_bits

BITS = (2, 3, 4, 8)


def random_groups(seed, operands=5, sketch=6, odd=False):
    """Operands of random size whose increase falls by about 6 dB a bit, with error sketches."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    increases, sizes, errors = {}, {}, {}
    for number in range(operands):
        key, level = f'weight:{number}', rng.uniform(0.01, 10)
        sizes[key] = rng.randrange(1000, 9000) if odd else 16 * rng.randrange(1, 9)
        errors[key] = {b: level * 2.0**-b * torch.randn(sketch).double() for b in BITS}
        increases[key] = {b: float(e.square().sum()) for b, e in errors[key].items()}
    return size_groups(increases, sizes, errors), sum(sizes.values())


def increase(plan):
    return sum(choice.increase for choice in plan)


def brute_force(groups, budget, objective):
    plans = itertools.product(*groups)
    return min(objective(p) for p in plans if total_cost(p) <= budget)


@pytest.mark.parametrize('seed', range(12))
def test_assignment_is_the_optimum(seed):
    groups, total = random_groups(seed)
    for mean in (2.0, 2.3, 3.0, 4.1, 6.5, 8.0):
        plan = assign_bits(groups, mean * total)
        assert total_cost(plan) <= mean * total
        assert increase(plan) == pytest.approx(
            brute_force(groups, mean * total, increase), rel=1e-12
        )


@pytest.mark.parametrize('seed', range(4))
def test_rounded_costs_keep_the_budget_and_lose_little(seed, monkeypatch):
    """With far fewer steps than distinct costs the budget holds all the same."""
    monkeypatch.setattr(bit_assignment, 'CELLS', 200)
    groups, total = random_groups(seed, odd=True)
    for mean in (2.4, 3.0, 3.7):
        plan = assign_bits(groups, mean * total)
        best = brute_force(groups, mean * total, increase)
        assert total_cost(plan) <= mean * total
        assert best <= increase(plan) * (1 + 1e-12)
        assert increase(plan) <= 1.3 * best
        for other in uniform_plans(groups, mean * total):
            assert increase(plan) <= increase(other)


def test_more_budget_never_hurts():
    groups, total = random_groups(3, operands=9)
    means = [2 + step / 20 for step in range(121)]
    found = [increase(assign_bits(groups, mean * total)) for mean in means]
    assert all(later <= earlier for earlier, later in itertools.pairwise(found))
    assert found[0] > 100 * found[-1]


def test_noisy_measurements_do_not_buy_bits():
    increases = {
        'weight:a': {2: 1.0, 3: 0.1, 4: 0.2, 8: 0.1},
        'weight:b': {2: 0.5, 3: -0.2, 4: 0.1},
    }
    assert monotone(increases['weight:b']) == {2: 0.5, 3: 0.0, 4: 0.0}
    plan = assign_bits(size_groups(increases, {'weight:a': 1, 'weight:b': 1}, {}), 12)
    assert [dict(choice.bits) for choice in plan] == [{'weight:a': 3}, {'weight:b': 3}]


def test_operands_that_meet_are_chosen_together():
    increases = {
        k: {b: 4.0**-b * f for b in (2, 3, 4)} for k, f in {'a': 1, 'b': 9, 'c': 3, 'd': 5}.items()
    }
    products = [Product(10, 'a', 'b'), Product(7, 'b', 'c'), Product(5, 'd', 8), Product(3, 2, 2)]
    groups = product_groups(increases, products, {})
    assert [set(group[0].bits) for group in groups] == [{'a', 'b', 'c'}, {'d'}]
    for group in groups:
        for choice in group:
            own = products[:2] if 'a' in choice.bits else products[2:3]
            assert choice.cost == sum(p.bit_operations(choice.bits) for p in own)
            assert choice.increase == pytest.approx(
                sum(increases[k][b] for k, b in choice.bits.items())
            )
    assert len(groups[0]) == 27
    for budget in (200, 260, 333, 400):
        plan = assign_bits(groups, budget)
        assert increase(plan) == pytest.approx(brute_force(groups, budget, increase))


@pytest.mark.parametrize('budget', [1.9, 8.1])
def test_unreachable_budget_is_refused(budget):
    groups, total = random_groups(0)
    with pytest.raises(ValueError, match=r'cannot be met; the candidate bits reach from 2 to 8'):
        assign_bits(groups, budget * total, lambda cost: f'{cost / total:g}')


@pytest.mark.parametrize('groups', [[], [[]]])
def test_nothing_to_choose_is_refused(groups):
    with pytest.raises(ValueError, match='no operand has candidate bits'):
        assign_bits(groups, 3)


@pytest.mark.parametrize('seed', range(10))
def test_search_finds_nearly_the_least_joint_increase(seed):
    groups, total = random_groups(seed, sketch=12)
    for mean in (2.5, 3.0, 4.0):
        plan = search_bits(groups, mean * total)
        best = brute_force(groups, mean * total, joint_increase)
        assert total_cost(plan) <= mean * total
        assert best * (1 - 1e-9) <= joint_increase(plan) <= 1.25 * best + 1e-12
        for start in (assign_bits(groups, mean * total), *uniform_plans(groups, mean * total)):
            assert joint_increase(plan) <= joint_increase(start) * (1 + 1e-12)


def test_search_lets_errors_cancel():
    """Two coarse operands whose errors cancel are better than one fine one."""
    up, zero = torch.tensor([1.0, 0.0]), torch.zeros(2)
    groups = [
        [Choice({'a': 2}, 2, 1.0, up), Choice({'a': 4}, 4, 0.0, zero)],
        [Choice({'b': 2}, 2, 1.0, -up), Choice({'b': 4}, 4, 0.0, zero)],
        [Choice({'c': 2}, 2, 0.5, up.flip(0) / 2), Choice({'c': 4}, 4, 0.0, zero)],
    ]
    plan = search_bits(groups, 8)
    assert [next(iter(choice.bits.values())) for choice in plan] == [2, 2, 4]
    assert joint_increase(plan) == 0
