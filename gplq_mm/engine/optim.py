# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Optimizer of stage 1: float weights and quantizer scales, each with its own LR."""

import copy
from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS, OPTIMIZERS
from torch import nn

from ..registry import OPTIM_WRAPPER_CONSTRUCTORS
from .amp import on_this_device
from .checkpoint import unwrap

SCALE_KEY = '_quantizer.scale'


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class GPLQOptimWrapperConstructor:
    """Optimizer that the recipe describes; whatever the config gives wins.

    Use it as ``optim_wrapper = dict(constructor='gplq_mm.GPLQOptimWrapperConstructor')``.

    Args:
        optim_wrapper_cfg: As for MMEngine's default constructor; ``type`` and
            ``optimizer`` may be absent.
        paramwise_cfg: As for MMEngine's default constructor; the scales' key is added.
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
        optim: dict[str, Any] = network.gplq.recipe['optim']
        wrapper = on_this_device({'type': 'OptimWrapper', **self.optim_wrapper_cfg})
        wrapper.setdefault(
            'optimizer',
            {
                'type': 'AdamW',
                'lr': optim['lr'],
                'weight_decay': optim['weight_decay'],
                'betas': tuple(optim['betas']),
            },
        )
        wrapper['optimizer'] = {'lr': optim['lr'], **wrapper['optimizer']}
        if not self.paramwise_cfg:
            return _two_groups(network, wrapper, optim)
        keys = dict(self.paramwise_cfg.get('custom_keys') or {})
        lr = wrapper['optimizer']['lr']
        scale = {'lr_mult': _scale_lr(lr, optim) / lr if lr else 1.0}
        decay = wrapper['optimizer'].get('weight_decay')
        if decay is not None:  # MMEngine refuses a factor on a decay that is not given
            scale['decay_mult'] = optim['scale_weight_decay'] / decay if decay else 0.0
        keys.setdefault(SCALE_KEY, scale)
        paramwise = {**self.paramwise_cfg, 'custom_keys': keys}
        return DefaultOptimWrapperConstructor(wrapper, paramwise)(model)


def _two_groups(network: nn.Module, wrapper: dict[str, Any], optim: dict[str, Any]) -> OptimWrapper:
    """Weights in one group, scales in another: a fast step, and no log line a parameter."""
    named = [(n, p) for n, p in network.named_parameters() if p.requires_grad]
    optimizer = {**wrapper.pop('optimizer')}
    optimizer['params'] = [
        {'params': [p for n, p in named if SCALE_KEY not in n]},
        {
            'params': [p for n, p in named if SCALE_KEY in n],
            'lr': _scale_lr(optimizer['lr'], optim),
            'weight_decay': optim['scale_weight_decay'],
        },
    ]
    optimizer['params'] = [g for g in optimizer['params'] if g['params']]
    if not optimizer['params']:
        raise ValueError(
            "stage 1 has nothing to train: recipe.optim.train='none' leaves the scales, and the "
            "recipe learns none; write train='all' or activation=dict(learn_scale=True)"
        )
    return OPTIM_WRAPPERS.build({**wrapper, 'optimizer': OPTIMIZERS.build(optimizer)})


def _scale_lr(lr: float, optim: dict[str, Any]) -> float:
    """LR of the scales: the recipe's, moved with the weights' where the config gives another."""
    return optim['scale_lr'] * (lr / optim['lr'] if optim['lr'] else 1.0)
