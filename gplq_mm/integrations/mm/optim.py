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

from ...compat.mmengine import accumulated_batches, train_loop
from ...distillation.optimizer_groups import (
    make_steps_proportional,
    moved_lr,
    parameter_groups,
    proportional_ids,
    scale_ids,
    short_run_factor,
    vector_ids,
)
from ...recipe import OptimSettings
from ...registry import OPTIM_WRAPPER_CONSTRUCTORS
from .checkpoints.run_checkpoint import unwrap
from .cpu_amp import on_this_device
from .runner_types import TrainingRunner

_OF_RECIPE = 'lr_of_recipe'
"""Attribute of a wrapper whose learning rate comes from the recipe, not from the config."""


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class GPLQOptimWrapperConstructor:
    """The optimizer that the recipe describes; keys given in the config take precedence.

    Use it as ``optim_wrapper = dict(constructor='gplq_mm.GPLQOptimWrapperConstructor')``.

    Args:
        optim_wrapper_cfg: As for MMEngine's default constructor; ``type`` and
            ``optimizer`` may be absent.
        paramwise_cfg: As for MMEngine's default constructor. It does not change the scales
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
            built = _own_groups(network, wrapper, optim)
        make_steps_proportional(built.optimizer, network, optim)
        setattr(built, _OF_RECIPE, of_recipe)
        return built

    def _paramwise(self, model: nn.Module, network: Any, wrapper: dict[str, Any]) -> OptimWrapper:
        optim, lr = network.gplq.recipe.optim, wrapper['optimizer']['lr']
        built = DefaultOptimWrapperConstructor(wrapper, self.paramwise_cfg)(model)
        if not any('quantizer' in key for key in self.paramwise_cfg.get('custom_keys') or {}):
            ids, decay = scale_ids(network), optim.scale_weight_decay
            _set_groups(built, ids, moved_lr(optim.scale_lr, lr, optim), decay)
        ids = vector_ids(network, optim)
        if ids:
            _set_groups(built, ids, moved_lr(optim.vector_lr, lr, optim), 0.0)
        return built


def _set_groups(built: OptimWrapper, ids: set[int], lr: float, decay: float) -> None:
    """Set LR and weight decay of the groups of some parameters; each group has one parameter.

    Done after the groups are built: the longest matching custom key wins in MMEngine, so a
    key for scales would lose against ``backbone.stages.0``.
    """
    for group in built.optimizer.param_groups:
        if all(id(p) in ids for p in group['params']):
            group['lr'], group['weight_decay'] = lr, decay


def shorten_lr_(runner: TrainingRunner, network: Any) -> str | None:
    """Lower the learning rate of a short stage 1: ``lr * sqrt(steps / lr_iterations)``.

    Near its optimum a model has to average out the noise of the steps, and a short run has too
    few steps for that (measured: ``docs/accuracy_trials.md``). Relative steps do not change. Done
    when the length of the training is known, for the optimizer and the initial rates of its
    schedulers.

    Args:
        runner: TrainingRunner before its training, checkpoints not yet resumed.
        network: Converted model.

    Returns:
        A message; None if the learning rate does not change: the training is long enough, or the
        config gives a number.
    """
    optim, built = network.gplq.recipe.optim, runner.optim_wrapper
    full = optim.lr_iterations
    if not getattr(built, _OF_RECIPE, False):
        return None
    steps = runner.max_iters / accumulated_batches(built)
    factor = short_run_factor(optim, steps)
    if factor == 1.0:
        return None
    kept = proportional_ids(network, optim)
    schedulers = runner.param_schedulers or []
    for index, group in enumerate(built.optimizer.param_groups):
        if all(id(p) in kept for p in group['params']):
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
        f'for {full} steps write {_longer(runner, full / steps)}'
    )


def _longer(runner: TrainingRunner, times: float) -> str:
    """The config line for a training that is longer by a factor."""
    loop = train_loop(runner)
    if isinstance(loop, EpochBasedTrainLoop):
        return f'train_cfg.max_epochs={math.ceil(loop.max_epochs * times)}'
    return f'train_cfg.max_iters={math.ceil(runner.max_iters * times)}'


def slow_average_warning(hooks: Iterable[Any], iterations: int) -> str | None:
    """Warning for an EMA too slow for this training: averaged weights are saved and scored.

    Args:
        hooks: Hooks of the runner.
        iterations: Iterations of the whole training.
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
    """Warning for an optimizer, built by any constructor, without a separate LR for scales.

    Args:
        built: The runner's optimizer wrapper.
        network: Converted model.

    Returns:
        The warning; None if the scales have their own LR or the recipe gives them none.
    """
    optim = network.gplq.recipe.optim
    scales = scale_ids(network)
    ids = vector_ids(network, optim)
    groups = getattr(getattr(built, 'optimizer', None), 'param_groups', [])
    rates = {
        is_scale: {
            group.get('initial_lr', group['lr'])
            for group in groups
            if any((id(p) in scales) == is_scale for p in group['params'] if id(p) not in ids)
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


def _own_groups(network: nn.Module, wrapper: dict[str, Any], optim: OptimSettings) -> OptimWrapper:
    """One group each for weights, for scales, and for biases with normalization gains."""
    optimizer = {**wrapper.pop('optimizer')}
    optimizer['params'] = parameter_groups(network, optim, optimizer['lr'])
    return OPTIM_WRAPPERS.build({**wrapper, 'optimizer': OPTIMIZERS.build(optimizer)})
