# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Registry of weight PTQ algorithms, and their construction from the recipe's ``weight.ptq``."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .task import CORRECTS, PREPARES, ROUNDS, WeightPTQ

PTQConfig = str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]
WEIGHT_PTQ: dict[str, type[WeightPTQ]] = {}


def register_weight_ptq(name: str) -> Callable[[type[WeightPTQ]], type[WeightPTQ]]:
    """Class decorator: make an algorithm available as ``weight=dict(ptq=name)``."""

    def add(cls: type[WeightPTQ]) -> type[WeightPTQ]:
        WEIGHT_PTQ[name] = cls
        cls.name = name
        return cls

    return add


def build_weight_ptq(config: PTQConfig) -> list[WeightPTQ]:
    """The algorithms that a recipe names, in order.

    Args:
        config: A name, ``dict(type=name, **options)``, or a list of those.

    Raises:
        ValueError: For an unknown name or option, an empty list, or an invalid order.

    Examples:
        >>> [type(a).__name__ for a in build_weight_ptq(dict(type='mse', steps=40))]
        ['MSEPTQ']
    """
    if isinstance(config, str | Mapping):
        config = [config]
    if not config:
        raise ValueError(f"weight.ptq is empty; write one of {sorted(WEIGHT_PTQ)}, e.g. ptq='mse'")
    algorithms = [_build(entry) for entry in config]
    _check_order(algorithms)
    return algorithms


def _check_order(algorithms: Sequence[WeightPTQ]) -> None:
    """Refuse any other order than prepare, round, correct."""
    names = [a.name for a in algorithms]
    first = next((i for i, a in enumerate(algorithms) if a.phase == ROUNDS), None)
    if first is None:
        example = [*(a.name for a in algorithms if a.phase == PREPARES), 'gptq']
        example += [a.name for a in algorithms if a.phase == CORRECTS]
        raise ValueError(f'weight.ptq={names}: none of these rounds weights; write {example}')
    for index, algorithm in enumerate(algorithms):
        if algorithm.phase == CORRECTS and index < first:
            raise ValueError(
                f'weight.ptq={names}: {algorithm.name} corrects quantized weights; put it after '
                f'{names[first]}'
            )
        if algorithm.phase == PREPARES and index > first:
            raise ValueError(
                f'weight.ptq={names}: {algorithm.name} changes float weights; put it before '
                f'{names[first]}'
            )


def _build(entry: str | Mapping[str, Any]) -> WeightPTQ:
    options = {'type': entry} if isinstance(entry, str) else dict(entry)
    name = options.pop('type', None)
    if name not in WEIGHT_PTQ:
        close = difflib.get_close_matches(str(name), WEIGHT_PTQ, n=1)
        hint = f'; did you mean {close[0]!r}?' if close else ''
        raise ValueError(f'weight.ptq={name!r} is unknown; write one of {sorted(WEIGHT_PTQ)}{hint}')
    try:
        return WEIGHT_PTQ[name](**options)
    except TypeError as error:
        raise ValueError(
            f'weight.ptq={name!r} does not take the options {options}: {error}'
        ) from None
