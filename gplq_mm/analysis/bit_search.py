# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Local search of bits by the joint error, in which errors of operands add up or cancel.

At few bits the errors of different layers are correlated, and the sum of the single error
increases is a poor estimate. To first order the joint error is the sum of the single errors,
so the joint error increase is a quadratic form; exchanges of one or two choices reduce it.
Source: the quadratic program of arXiv 2307.05657 (CLADO), with measured errors instead of
its pairwise measurements.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .bit_assignment import Choice, assign_bits, pareto, total_cost, uniform_plans

_ROWS = 256
_TOLERANCE = 1e-12


def joint_increase(plan: Sequence[Choice]) -> float:
    """First-order error increase of a plan: the squared norm of its summed errors.

    Args:
        plan: Choices with errors.

    Examples:
        >>> one = Choice({'a': 2}, 2, 1.0, torch.tensor([1.0, 0.0]))
        >>> opposite = Choice({'b': 2}, 2, 1.0, torch.tensor([-1.0, 0.0]))
        >>> joint_increase([one, one]), joint_increase([one, opposite])
        (4.0, 0.0)
    """
    return float(_errors(plan).sum(0).square().sum())


def search_bits(groups: Sequence[Sequence[Choice]], budget: float) -> list[Choice]:
    """Choice of each group with the least joint error increase found within the budget.

    It starts from the additive optimum and from every uniform setting within the budget, and
    exchanges one or two choices while that reduces ``joint_increase``; so it is not worse than
    any of the starts.

    Args:
        groups: Possible choices of each group, with errors.
        budget: Bound of the total cost.

    Raises:
        ValueError: As for ``assign_bits``.
    """
    starts = [assign_bits(groups, budget), *uniform_plans(groups, budget)]
    fronts = [pareto(group) for group in groups]
    found = [_exchange(fronts, start, budget) for start in starts]
    return min(found, key=joint_increase)


def _exchange(
    fronts: Sequence[Sequence[Choice]], start: Sequence[Choice], budget: float
) -> list[Choice]:
    plan, increase = list(start), joint_increase(start)
    moves = [(number, choice) for number, front in enumerate(fronts) for choice in front]
    group = torch.tensor([number for number, _ in moves])
    errors = _errors([choice for _, choice in moves])
    costs = torch.tensor([choice.cost for _, choice in moves], dtype=torch.float64)
    while True:
        now = _errors(plan)
        paid = torch.tensor([choice.cost for choice in plan], dtype=torch.float64)
        change, extra = errors - now[group], costs - paid[group]
        found = _best_pair(change, extra, group, now.sum(0), budget - total_cost(plan))
        better = list(plan)
        for index in found:
            number, choice = moves[index]
            better[number] = choice
        if not joint_increase(better) < increase * (1 - _TOLERANCE):
            return plan
        plan, increase = better, joint_increase(better)


def _best_pair(
    change: Tensor, extra: Tensor, group: Tensor, total: Tensor, room: float
) -> list[int]:
    """Best exchange of one or two choices, in different groups, within the budget."""
    single = 2 * (change @ total) + change.square().sum(1)
    alone = single.masked_fill(extra > room, float('inf'))
    value, index = alone.min(0)
    best, moves = float(value), [int(index)]
    for first in range(0, len(change), _ROWS):
        rows = slice(first, first + _ROWS)
        both = single[rows, None] + single + 2 * (change[rows] @ change.T)
        fits = (extra[rows, None] + extra <= room) & (group[rows, None] != group)
        value, index = both.masked_fill_(~fits, float('inf')).flatten().min(0)
        if float(value) < best:
            row, column = divmod(int(index), len(change))
            best, moves = float(value), [first + row, column]
    return moves if best < 0 else []


def _errors(plan: Sequence[Choice]) -> Tensor:
    errors = [choice.error for choice in plan if choice.error is not None]
    assert len(errors) == len(plan), 'every choice needs its error'
    return torch.stack(errors).double()
