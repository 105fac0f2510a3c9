# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Optimizer of stage 1: float weights and quantizer scales, each with its own LR."""

import copy
import math
from collections.abc import Iterable
from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS, OPTIMIZERS
from mmengine.runner import EpochBasedTrainLoop
from torch import nn

from ..recipe import OptimSettings
from ..registry import OPTIM_WRAPPER_CONSTRUCTORS
from .amp import on_this_device
from .checkpoint import unwrap
from .scale_steps import RelativeSteps

SCALE_KEY = '_quantizer.scale'
_OF_RECIPE = 'lr_of_recipe'
"""Attribute of a wrapper whose learning rate the config left to the recipe."""


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class GPLQOptimWrapperConstructor:
    """Optimizer that the recipe describes; whatever the config gives wins.

    Use it as ``optim_wrapper = dict(constructor='gplq_mm.GPLQOptimWrapperConstructor')``.

    Args:
        optim_wrapper_cfg: As for MMEngine's default constructor; ``type`` and
            ``optimizer`` may be absent.
        paramwise_cfg: As for MMEngine's default constructor. It leaves the scales alone
            unless one of its custom keys names them, such as ``_quantizer.scale``.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        self.optim_wrapper_cfg = copy.deepcopy(dict(optim_wrapper_cfg))
        self.paramwise_cfg = copy.deepcopy(dict(paramwise_cfg or {}))

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the wrapper for a converted model.

        Raises:
            TypeError: If the model was not built by ``gplq_mm.GPLQ``.
            ValueError: If nothing trains.
        """
        network = unwrap(model)
        optim: OptimSettings = network.gplq.recipe.optim
        wrapper = on_this_device({'type': 'OptimWrapper', **self.optim_wrapper_cfg})
        wrapper.setdefault(
            'optimizer',
            {
                'type': 'AdamW',
                'lr': optim.lr,
                'weight_decay': optim.weight_decay,
                'betas': tuple(optim.betas),
            },
        )
        of_recipe = 'lr' not in (self.optim_wrapper_cfg.get('optimizer') or {})
        wrapper['optimizer'] = {'lr': optim.lr, **wrapper['optimizer']}
        if self.paramwise_cfg:
            built = self._paramwise(model, network, wrapper)
        else:
            built = _two_groups(network, wrapper, optim)
        if optim.scale_step == 'relative':
            ids = _scale_ids(network)
            groups = built.optimizer.param_groups
            scales = [p for group in groups for p in group['params'] if id(p) in ids]
            RelativeSteps(built.optimizer, scales)  # lives as hooks of the optimizer
        setattr(built, _OF_RECIPE, of_recipe)
        return built

    def _paramwise(self, model: nn.Module, network: Any, wrapper: dict[str, Any]) -> OptimWrapper:
        optim, lr = network.gplq.recipe.optim, wrapper['optimizer']['lr']
        built = DefaultOptimWrapperConstructor(wrapper, self.paramwise_cfg)(model)
        if not any('quantizer' in key for key in self.paramwise_cfg.get('custom_keys') or {}):
            _set_scale_groups(built, network, _scale_lr(lr, optim), optim.scale_weight_decay)
        return built


def _set_scale_groups(built: OptimWrapper, network: nn.Module, lr: float, decay: float) -> None:
    """Set LR and decay of the scales' groups, of which each holds one parameter.

    Done afterwards: among MMEngine's custom keys the longest that matches wins, so that
    a key of the scales would lose against ``backbone.stages.0``.
    """
    scales = _scale_ids(network)
    for group in built.optimizer.param_groups:
        if all(id(p) in scales for p in group['params']):
            group['lr'], group['weight_decay'] = lr, decay


def shorten_lr_(runner: Any, network: Any) -> str | None:
    """Smaller steps where stage 1 has few: ``lr * sqrt(steps / lr_iterations)``.

    A model near its optimum has to average out what noise a step brings, and a short run has
    no steps for it (measured: ``docs/accuracy.md``). Scales keep their learning rate. Done once
    the length of the training is known, for the optimizer and what its schedulers start from.

    Args:
        runner: Runner before its training, checkpoints not yet resumed.
        network: Converted model.

    Returns:
        What was done, in words; None where the learning rate stays: a training that is long
        enough, or a number that the config gives.
    """
    optim, built = network.gplq.recipe.optim, runner.optim_wrapper
    full = optim.lr_iterations
    if not getattr(built, _OF_RECIPE, False):
        return None
    steps = runner.max_iters / built._accumulative_counts
    if not 0 < steps < full:
        return None
    factor = math.sqrt(steps / full)
    scales = _scale_ids(network)
    schedulers = runner.param_schedulers or []
    for index, group in enumerate(built.optimizer.param_groups):
        if all(id(p) in scales for p in group['params']):
            continue
        for key in ('lr', 'initial_lr'):
            if key in group:
                group[key] *= factor
        for scheduler in schedulers:
            if scheduler.param_name == 'lr':
                scheduler.base_values[index] *= factor
    return (
        f'{steps:g} steps are fewer than {full}: weights train with the learning rate '
        f'{optim.lr * factor:.2g} instead of {optim.lr:.2g} (recipe.optim.lr_iterations); '
        f'for as many steps write {_longer(runner, full / steps)}'
    )


def _longer(runner: Any, times: float) -> str:
    """What to write for a training that is longer by a factor."""
    loop = getattr(runner, '_train_loop', None)
    if isinstance(loop, EpochBasedTrainLoop):
        return f'train_cfg.max_epochs={math.ceil(loop.max_epochs * times)}'
    return f'train_cfg.max_iters={math.ceil(runner.max_iters * times)}'


def slow_average_warning(hooks: Iterable[Any], iterations: int) -> str | None:
    """What to say where an EMA would leave stage 1 mostly out; it is what is saved and scored.

    Args:
        hooks: The runner's.
        iterations: Of the whole training.
    """
    for hook in hooks:
        cfg = getattr(hook, 'ema_cfg', None)
        if cfg is None or cfg.get('type', 'ExponentialMovingAverage') != 'ExponentialMovingAverage':
            continue
        momentum = cfg.get('momentum', 0.0002)
        left = (1 - momentum) ** iterations
        if iterations and left > 0.05:
            return (
                f'EMAHook with momentum={momentum} over {iterations} iterations: {left:.0%} of the '
                'averaged weights, which are saved, scored and quantized, will still be the float '
                f"model's; leave the hook out, or write momentum={min(5 / iterations, 0.5):.2g}"
            )
    return None


def shared_lr_warning(built: Any, network: Any) -> str | None:
    """What to say where an optimizer, however it was built, has no LR of its own for scales.

    Args:
        built: The runner's optimizer wrapper.
        network: Converted model.

    Returns:
        The warning; None where the scales have their own LR or the recipe wants none.
    """
    optim = network.gplq.recipe.optim
    scales = _scale_ids(network)
    groups = getattr(getattr(built, 'optimizer', None), 'param_groups', [])
    rates = {
        is_scale: {
            group.get('initial_lr', group['lr'])
            for group in groups
            if any((id(p) in scales) == is_scale for p in group['params'])
        }
        for is_scale in (True, False)
    }
    if optim.scale_lr == optim.lr or not rates[True] or not rates[True] <= rates[False]:
        return None
    return (
        f'the scales of the quantizers train with the LR of the weights, {sorted(rates[True])}: '
        f'recipe.optim (scale_lr={optim.scale_lr}, lr={optim.lr}) has no effect; write '
        "optim_wrapper = dict(constructor='gplq_mm.GPLQOptimWrapperConstructor', ...)"
    )


def _two_groups(network: nn.Module, wrapper: dict[str, Any], optim: Any) -> OptimWrapper:
    """Weights in one group, scales in another: a fast step, and no log line a parameter."""
    named = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
    optimizer = {**wrapper.pop('optimizer')}
    optimizer['params'] = [
        {'params': [p for n, p in named if SCALE_KEY not in n]},
        {
            'params': [p for n, p in named if SCALE_KEY in n],
            'lr': _scale_lr(optimizer['lr'], optim),
            'weight_decay': optim.scale_weight_decay,
        },
    ]
    optimizer['params'] = [g for g in optimizer['params'] if g['params']]
    if not optimizer['params']:
        raise ValueError(
            "stage 1 has nothing to train: recipe.optim.train='none' leaves the scales, and the "
            "recipe learns none; write train='all' or activation=dict(learn_scale=True)"
        )
    return OPTIM_WRAPPERS.build({**wrapper, 'optimizer': OPTIMIZERS.build(optimizer)})


def _scale_ids(network: nn.Module) -> set[int]:
    """Identities of the quantizers' scales, to tell them among an optimizer's parameters."""
    return {id(p) for n, p in network.named_parameters() if SCALE_KEY in n}


def _scale_lr(lr: float, optim: Any) -> float:
    """LR of the scales: the recipe's, moved with the weights' where the config gives another."""
    return optim.scale_lr * (lr / optim.lr if optim.lr else 1.0)
