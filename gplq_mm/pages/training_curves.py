# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Training curves from the scalars that MMEngine logs."""

from collections.abc import Mapping, Sequence
from typing import Any

MOST_POINTS = 400
"""Points of a curve: more than a screen has room for would only make the page large."""
_PREFIX, _OTHERS = 'loss', ('lr', 'grad_norm', 'acc')


def curves(scalars: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """Points of each curve by name: the loss, its terms, learning rate and others.

    Args:
        scalars: Logged iterations in order. A resumed run logs some twice; the later one counts.

    Examples:
        >>> curves([dict(iter=1, loss=2.0, lr=0.1), dict(iter=2, loss=1.0, time=0.5)])
        {'loss': [{'x': 1, 'y': 2.0}, {'x': 2, 'y': 1.0}], 'lr': [{'x': 1, 'y': 0.1}]}
    """
    steps = {_step(line, number): line for number, line in enumerate(scalars, 1)}
    names = dict.fromkeys(key for line in steps.values() for key in line if _is_shown(key))
    found = {}
    for name in sorted(names, key=_order):
        points = [{'x': x, 'y': line[name]} for x, line in sorted(steps.items()) if name in line]
        found[name] = _thinned(points)
    return found


def _step(line: Mapping[str, Any], number: int) -> int:
    """``step`` counts the iterations of the whole run, ``iter`` those of MMEngine's log."""
    return int(line.get('step', line.get('iter', number)))


def _is_shown(key: str) -> bool:
    return key in _OTHERS or key.rsplit('/', 1)[-1].split('.')[-1].startswith(_PREFIX)


def _order(name: str) -> tuple[int, str]:
    if name == _PREFIX:
        return 0, name
    return (2 + _OTHERS.index(name), name) if name in _OTHERS else (1, name)


def _thinned(points: list[dict[str, float]]) -> list[dict[str, float]]:
    """Every n-th point and the last one."""
    every = -(-len(points) // MOST_POINTS)
    return points[::every] + points[-1:] * ((len(points) - 1) % every > 0)
