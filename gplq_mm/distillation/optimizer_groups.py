# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Parameter groups, learning rates and proportional steps of stage 1's optimizer."""

import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .scale_steps import ProportionalSteps, RelativeSteps

SCALE_KEY = '_quantizer.scale'
"""Part of the names of learned scales."""


def scale_ids(model: nn.Module) -> set[int]:
    """``id`` of the quantizers' scales, to find them among an optimizer's parameters."""
    return {id(p) for n, p in model.named_parameters() if SCALE_KEY in n}


def biases_and_gains(model: nn.Module) -> dict[str, nn.Parameter]:
    """Biases, normalization parameters and LayerScale by name: all 1-D parameters but scales."""
    return {n: p for n, p in model.named_parameters() if p.dim() == 1 and SCALE_KEY not in n}


def vectors(model: nn.Module, optim: Any) -> dict[str, nn.Parameter]:
    """Trained biases and gains by name; none if the recipe has no ``vector_lr``."""
    if optim.vector_lr is None:
        return {}
    return {n: p for n, p in biases_and_gains(model).items() if p.requires_grad}


def vector_ids(model: nn.Module, optim: Any) -> set[int]:
    """``id`` of each parameter of ``vectors``."""
    return {id(p) for p in vectors(model, optim).values()}


def proportional_ids(model: nn.Module, optim: Any) -> set[int]:
    """``id`` of the parameters with other learning rates than the weights: scales, ``vectors``."""
    return scale_ids(model) | vector_ids(model, optim)


def moved_lr(own: float, lr: float, optim: Any) -> float:
    """Learning rate of scales or vectors, multiplied by the ratio of ``lr`` to ``optim.lr``.

    Args:
        own: ``optim.scale_lr`` or ``optim.vector_lr``.
        lr: Learning rate of the weights.
        optim: ``OptimSettings`` of the recipe, with ``auto`` resolved.

    Examples:
        >>> from gplq_mm.recipe import as_recipe
        >>> moved_lr(1e-4, 2e-3, as_recipe(dict(optim=dict(lr=1e-3))).optim)
        0.0002
    """
    return own * (lr / optim.lr if optim.lr else 1.0)


def parameter_groups(model: nn.Module, optim: Any, lr: float) -> list[dict[str, Any]]:
    """One group each for weights, scales, and biases with gains: fast steps, few log lines.

    Args:
        model: Converted model.
        optim: ``OptimSettings`` of the recipe, its ``auto`` settled.
        lr: Learning rate of the weights.

    Returns:
        Groups for a torch optimizer, without empty ones.

    Raises:
        ValueError: If nothing trains.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    scales = {n: p for n, p in trained.items() if SCALE_KEY in n}
    biases_and_gains = vectors(model, optim)
    others = {n: p for n, p in trained.items() if n not in scales | biases_and_gains}
    groups: list[dict[str, Any]] = [
        {'params': list(others.values())},
        {
            'params': list(scales.values()),
            'lr': moved_lr(optim.scale_lr, lr, optim),
            'weight_decay': optim.scale_weight_decay,
        },
        {
            'params': list(biases_and_gains.values()),
            'lr': moved_lr(optim.vector_lr or 0.0, lr, optim),
            'weight_decay': 0.0,
        },
    ]
    groups = [g for g in groups if g['params']]
    if not groups:
        raise ValueError(
            "stage 1 has nothing to train: recipe.optim.train='none' trains the scales only, and "
            "the recipe learns none; write train='all' or activation=dict(learn_scale=True)"
        )
    return groups


def make_steps_proportional(optimizer: Optimizer, model: nn.Module, optim: Any) -> None:
    """Make steps of scales, biases and gains proportional to their size, as the recipe sets.

    Args:
        optimizer: Optimizer of the model's parameters; hooks are added to it.
        model: Converted model.
        optim: ``OptimSettings`` of the recipe, its ``auto`` settled.
    """
    if optim.scale_step == 'relative':
        ids = scale_ids(model)
        held = [p for group in optimizer.param_groups for p in group['params']]
        scales = [p for p in held if id(p) in ids]
        if scales:
            RelativeSteps(optimizer, scales)
    found = vectors(model, optim)
    if found:
        step_in_proportion(optimizer, found)


def step_in_proportion(optimizer: Optimizer, found: Mapping[str, nn.Parameter]) -> None:
    """Let biases and gains step in proportion to themselves, see ``ProportionalSteps``.

    Args:
        optimizer: Optimizer of these parameters; gets hooks.
        found: Biases, whose names end with ``bias``, and gains, by name.
    """
    biases = {n: p for n, p in found.items() if n.endswith('bias')}
    ProportionalSteps(optimizer, biases.values(), [p for n, p in found.items() if n not in biases])


def short_run_factor(optim: Any, steps: float) -> float:
    """Factor of the weights' LR for a short stage 1: ``sqrt(steps / lr_iterations)``, at most 1.

    Near the optimum the noise of the steps has to be averaged out, and a short run has too few
    steps for it (measured: ``docs/accuracy_trials.md``).

    Args:
        optim: ``OptimSettings`` of the recipe, its ``auto`` settled.
        steps: Optimizer steps of the whole training.

    Examples:
        >>> from gplq_mm.recipe import as_recipe
        >>> optim = as_recipe(dict(optim=dict(lr_iterations=400))).optim
        >>> short_run_factor(optim, 100), short_run_factor(optim, 500)
        (0.5, 1.0)
    """
    full = optim.lr_iterations
    return math.sqrt(steps / full) if 0 < steps < full else 1.0
