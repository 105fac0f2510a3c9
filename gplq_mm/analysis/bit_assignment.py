# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Bits for each operand under a budget, from measured sensitivities.

A multiple-choice knapsack problem: one choice of bits per operand (or per group of operands
whose costs multiply) with the least total error increase at a total cost within the budget.
Dynamic programming over the cost solves it, exactly if the costs have few distinct values.
In ``sensitivity.json`` an error increase has the key ``damage``.
Source: the problem of HAWQ-V2 (arXiv 1911.03852), with its Pareto front.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor

Increases = Mapping[str, Mapping[int, float]]
Errors = Mapping[str, Mapping[int, Tensor]]
CELLS = 1 << 16
"""Cost steps of the dynamic program; finer costs are rounded up, so that the budget holds, and
the rest of the budget is then spent on one operand after the other."""


@dataclass(frozen=True)
class Choice:
    """One possible setting of an operand or of a group.

    Attributes:
        bits: Bits by operand key.
        cost: Cost in units of the budget, an integer.
        increase: Measured error increase.
        error: Sketch of the outputs' error, ``(SKETCH,)``; None without one.
    """

    bits: Mapping[str, int]
    cost: int
    increase: float
    error: Tensor | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Product:
    """Multiply-accumulates of two operands: a layer, or a matmul of two activations.

    Attributes:
        macs: Number of multiply-accumulates.
        lhs: Key of one operand, or its fixed bits.
        rhs: Key of the other, or its fixed bits.
    """

    macs: int
    lhs: str | int
    rhs: str | int

    def free(self) -> list[str]:
        """Operands whose bits are not fixed."""
        return [side for side in (self.lhs, self.rhs) if isinstance(side, str)]

    def bit_operations(self, bits: Mapping[str, int]) -> int:
        """``macs * bits * bits``."""
        lhs = bits[self.lhs] if isinstance(self.lhs, str) else self.lhs
        rhs = bits[self.rhs] if isinstance(self.rhs, str) else self.rhs
        return self.macs * lhs * rhs


def monotone(increase: Mapping[int, float]) -> dict[int, float]:
    """Error increase, made non-negative and non-increasing in the bits.

    By chance more bits can have a slightly larger measured error than fewer; both then get
    the same value, and the assignment prefers fewer bits.

    Args:
        increase: Measured error increase by bits.

    Examples:
        >>> monotone({2: 0.5, 3: 0.1, 4: 0.2, 8: -0.1})
        {2: 0.5, 3: 0.1, 4: 0.1, 8: 0.0}
    """
    found, least = {}, math.inf
    for bits in sorted(increase):
        least = min(least, max(increase[bits], 0.0))
        found[bits] = least
    return found


def size_groups(
    increases: Increases, sizes: Mapping[str, int], errors: Errors
) -> list[list[Choice]]:
    """Choices for a budget of bits: each operand costs ``size * bits``.

    Args:
        increases: Error increase by bits, by operand key.
        sizes: Weights or elements by operand key.
        errors: Sketches by bits, by operand key; may be empty.
    """
    return [
        [
            Choice({key: b}, sizes[key] * b, d, _sum_errors(errors, {key: b}))
            for b, d in monotone(increase).items()
        ]
        for key, increase in increases.items()
    ]


def product_groups(
    increases: Increases, products: Sequence[Product], errors: Errors
) -> list[list[Choice]]:
    """Choices for a budget of bit operations.

    Operands of the same product are one group, with all combinations of bits.

    Args:
        increases: Error increase by bits, by operand key.
        products: All products of those operands.
        errors: Sketches by bits, by operand key; may be empty.
    """
    smooth = {key: monotone(increase) for key, increase in increases.items()}
    groups = []
    for keys in _connected(list(smooth), products):
        own = [p for p in products if set(p.free()) & set(keys)]
        choices = []
        for values in product(*(smooth[key] for key in keys)):
            bits = dict(zip(keys, values, strict=True))
            cost = sum(p.bit_operations(bits) for p in own)
            increase = sum(smooth[k][b] for k, b in bits.items())
            choices.append(Choice(bits, cost, increase, _sum_errors(errors, bits)))
        groups.append(choices)
    return groups


def _sum_errors(errors: Errors, bits: Mapping[str, int]) -> Tensor | None:
    found = [errors[key][value] for key, value in bits.items() if key in errors]
    return torch.stack(found).sum(0) if found else None


def assign_bits(
    groups: Sequence[Sequence[Choice]],
    budget: float,
    describe: Callable[[float], str] = '{:g}'.format,
) -> list[Choice]:
    """Choice of each group with the least total error increase within the budget.

    It is the optimum if costs need at most ``CELLS`` steps. Otherwise costs are rounded
    up, and the result is never worse than any setting with the same bits for all
    operands.

    Args:
        groups: Possible choices of each group.
        budget: Bound of the total cost.
        describe: Text of a total cost in the user's unit, for messages.

    Raises:
        ValueError: If there is nothing to choose, or the budget is below the cheapest or
            above the most expensive setting.

    Examples:
        >>> fine, coarse = Choice({'fc': 4}, 4, 0.1), Choice({'fc': 2}, 2, 0.5)
        >>> assign_bits([[fine, coarse]], 3)[0].bits
        {'fc': 2}
    """
    check_budget(groups, budget, describe)
    fronts = [pareto(group) for group in groups]
    plans = [_solve(fronts, budget), *uniform_plans(groups, budget)]
    best = min(plans, key=_total_increase)
    return _spend_rest(fronts, best, budget)


def check_budget(
    groups: Sequence[Sequence[Choice]],
    budget: float,
    describe: Callable[[float], str] = '{:g}'.format,
) -> None:
    """Refuse a budget below the cheapest or above the most expensive setting.

    Args:
        groups: Possible choices of each group; their increase is not used.
        budget: Bound of the total cost.
        describe: As for ``assign_bits``.

    Raises:
        ValueError: If there is nothing to choose, or the budget is below the cheapest or
            above the most expensive setting.
    """
    if not groups or not all(groups):
        raise ValueError('no operand has candidate bits; measure at least one, e.g. bits=[2, 3, 4]')
    least = sum(min(c.cost for c in group) for group in groups)
    most = sum(max(c.cost for c in group) for group in groups)
    if not least <= budget <= most:
        raise ValueError(
            f'a budget of {describe(budget)} cannot be met; the candidate bits reach from '
            f'{describe(least)} to {describe(most)}: write a budget in between, or other bits'
        )


def total_cost(choices: Sequence[Choice]) -> int:
    """Sum of the costs."""
    return sum(choice.cost for choice in choices)


def _total_increase(choices: Sequence[Choice]) -> float:
    return math.fsum(choice.increase for choice in choices)


def pareto(group: Sequence[Choice]) -> list[Choice]:
    """Pareto-optimal choices, cost ascending and error increase falling."""
    front: list[Choice] = []
    for choice in sorted(group, key=lambda c: (c.cost, c.increase)):
        if not front or choice.increase < front[-1].increase:
            front.append(choice)
    return front


def _solve(fronts: Sequence[Sequence[Choice]], budget: float) -> list[Choice]:
    """Dynamic program: ``table[c]`` is the least error increase for at most ``c`` cost steps."""
    extras = [[choice.cost - front[0].cost for choice in front] for front in fronts]
    room = math.floor(budget) - sum(front[0].cost for front in fronts)
    room = min(room, sum(extra[-1] for extra in extras))
    unit = math.gcd(*(cost for extra in extras for cost in extra)) or 1
    step = unit * max(1, math.ceil(room // unit / CELLS))
    table = torch.zeros(room // step + 1, dtype=torch.float64)
    taken = []
    for front, extra in zip(fronts, extras, strict=True):
        table, choice = _add_group(table, front, [-(-cost // step) for cost in extra])
        taken.append(choice)
    cell, plan = len(table) - 1, []
    for front, extra, choice in reversed(list(zip(fronts, extras, taken, strict=True))):
        index = int(choice[cell])
        plan.append(front[index])
        cell -= -(-extra[index] // step)
    return plan[::-1]


def _add_group(
    table: Tensor, front: Sequence[Choice], steps: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Table with another group, and the index of its choice in each cell."""
    best = table + front[0].increase
    index = torch.zeros(len(table), dtype=torch.int16)
    for number in range(1, len(front)):
        if steps[number] >= len(table):
            break
        with_it = table[: len(table) - steps[number]] + front[number].increase
        better = with_it < best[steps[number] :]
        best[steps[number] :] = torch.where(better, with_it, best[steps[number] :])
        index[steps[number] :][better] = number
    return best, index


def uniform_plans(groups: Sequence[Sequence[Choice]], budget: float) -> list[list[Choice]]:
    """Plans with the same bits for all operands that fit the budget."""
    widths = {bits for group in groups for choice in group for bits in choice.bits.values()}
    plans = []
    for width in sorted(widths):
        plan = [c for group in groups for c in group if set(c.bits.values()) == {width}]
        if len(plan) == len(groups) and total_cost(plan) <= budget:
            plans.append(plan)
    return plans


def _spend_rest(
    fronts: Sequence[Sequence[Choice]], plan: Sequence[Choice], budget: float
) -> list[Choice]:
    """Repeat the affordable step with the largest decrease of the error per unit of cost."""
    plan = list(plan)
    while True:
        rest = budget - total_cost(plan)
        gains = [
            ((now.increase - new.increase) / max(new.cost - now.cost, 1e-9), number, new)
            for number, now in enumerate(plan)
            for new in fronts[number]
            if new.increase < now.increase and new.cost - now.cost <= rest
        ]
        if not gains:
            return plan
        _, number, new = max(gains, key=lambda gain: gain[0])
        plan[number] = new


def _connected(keys: Sequence[str], products: Sequence[Product]) -> list[list[str]]:
    """Groups of operands that share products, directly or through others."""
    group_of = {key: {key} for key in keys}
    for item in products:
        merged: set[str] = set().union(*(group_of[key] for key in item.free()))
        for key in merged:
            group_of[key] = merged
    unique = {id(group): group for group in group_of.values()}
    return [[key for key in keys if key in group] for group in unique.values()]
