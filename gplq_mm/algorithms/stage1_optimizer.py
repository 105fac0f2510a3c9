# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""What a recipe says of stage 1's optimizer: groups of parameters and the length of the steps."""

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

SCALE_KEY = '_quantizer.scale'
"""Part of a parameter's name by which learned scales are told from weights."""


def scale_ids(model: nn.Module) -> set[int]:
    """Identities of the quantizers' scales, to tell them among an optimizer's parameters."""
    return {id(p) for n, p in model.named_parameters() if SCALE_KEY in n}


def scale_lr(lr: float, optim: Mapping[str, Any]) -> float:
    """LR of the scales: the recipe's, moved with the weights' where another one is given.

    Args:
        lr: Of the weights.
        optim: ``recipe['optim']``, its ``auto`` settled.

    Examples:
        >>> scale_lr(2e-3, dict(lr=1e-3, scale_lr=1e-4))
        0.0002
    """
    return optim['scale_lr'] * (lr / optim['lr'] if optim['lr'] else 1.0)


def parameter_groups(model: nn.Module, optim: Mapping[str, Any], lr: float) -> list[dict[str, Any]]:
    """Weights in one group, scales in another: a fast step, and no log line a parameter.

    Args:
        model: Converted model.
        optim: ``recipe['optim']``, its ``auto`` settled.
        lr: Of the weights.

    Returns:
        Groups for a torch optimizer, empty ones left out.

    Raises:
        ValueError: If nothing trains.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {'params': [p for n, p in named if SCALE_KEY not in n]},
        {
            'params': [p for n, p in named if SCALE_KEY in n],
            'lr': scale_lr(lr, optim),
            'weight_decay': optim['scale_weight_decay'],
        },
    ]
    groups = [g for g in groups if g['params']]
    if not groups:
        raise ValueError(
            "stage 1 has nothing to train: recipe.optim.train='none' leaves the scales, and the "
            "recipe learns none; write train='all' or activation=dict(learn_scale=True)"
        )
    return groups


def short_run_factor(optim: Mapping[str, Any], steps: float) -> float:
    """Factor of the weights' LR where stage 1 has few steps: ``sqrt(steps / lr_iterations)``.

    A model near its optimum has to average out what noise a step brings, and a short run has
    no steps for it (measured: ``docs/accuracy.md``).

    Args:
        optim: ``recipe['optim']``, its ``auto`` settled.
        steps: Optimizer steps of the whole training.

    Examples:
        >>> short_run_factor(dict(lr_iterations=400), 100), short_run_factor({}, 100)
        (0.5, 1.0)
    """
    full = optim.get('lr_iterations', 0)
    return math.sqrt(steps / full) if 0 < steps < full else 1.0
