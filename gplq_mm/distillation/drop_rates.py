# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Dropout and stochastic depth in stage 1.

The float model was trained with them against overfitting. Stage 1 is one epoch of comparison
with a teacher without dropout, in which the student's random drops are noise.
"""

from typing import Any

from torch import nn

DROP_RATES = ('keep', 'off')
_FLOAT_RATES = ('drop_prob', 'attn_drop', 'attention_dropout', 'dropout', 'p')
"""Attributes of mmcv, mmpretrain, mmdet, torch and torchvision that hold a rate as a number."""


def set_drop_rates_(model: nn.Module, drop_rates: str) -> int:
    """Turn off dropout and stochastic depth in place, or keep them.

    Args:
        model: Converted model.
        drop_rates: ``keep`` for the float model's rates, ``off`` for none.

    Returns:
        Number of rates that were turned off.

    Raises:
        ValueError: If ``drop_rates`` is neither.

    Examples:
        >>> set_drop_rates_(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)), 'off')
        1
    """
    if drop_rates not in DROP_RATES:
        raise ValueError(
            f"recipe.optim.drop_rates={drop_rates!r}: write one of {DROP_RATES}, or 'auto'"
        )
    if drop_rates == 'keep':
        return 0
    return sum(_turn_off(module) for module in model.modules() if _drops(module))


def _drops(module: nn.Module) -> bool:
    """Whether a module can drop elements: by class for layers, by attribute for attention."""
    name = type(module).__name__.lower()
    return 'drop' in name or 'stochasticdepth' in name or 'attention' in name or 'msa' in name


def _turn_off(module: Any) -> int:
    rates = [a for a in _FLOAT_RATES if isinstance(vars(module).get(a), float)]
    on = [a for a in rates if getattr(module, a) > 0]
    for attribute in on:
        setattr(module, attribute, 0.0)
    return len(on)
