# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Optimizer of stage 1: float weights and quantizer scales, each with its own LR."""

import copy
from typing import Any

from mmengine.model import is_model_wrapper
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from torch import nn

from ..registry import OPTIM_WRAPPER_CONSTRUCTORS

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
        """
        network = model.module if is_model_wrapper(model) else model
        state = getattr(network, 'gplq', None)
        if state is None:
            raise TypeError(
                'GPLQOptimWrapperConstructor reads the recipe of a model built by '
                "type='gplq_mm.GPLQ'; this model was not"
            )
        optim: dict[str, Any] = state.recipe['optim']
        wrapper = {'type': 'OptimWrapper', **self.optim_wrapper_cfg}
        wrapper.setdefault(
            'optimizer',
            {
                'type': 'AdamW',
                'lr': optim['lr'],
                'weight_decay': optim['weight_decay'],
                'betas': tuple(optim['betas']),
            },
        )
        keys = dict(self.paramwise_cfg.get('custom_keys') or {})
        decay = wrapper['optimizer'].get('weight_decay') or 0.0
        keys.setdefault(
            SCALE_KEY,
            {
                'lr_mult': optim['scale_lr'] / optim['lr'],
                'decay_mult': optim['scale_weight_decay'] / decay if decay else 0.0,
            },
        )
        paramwise = {**self.paramwise_cfg, 'custom_keys': keys}
        return DefaultOptimWrapperConstructor(wrapper, paramwise)(model)
