# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""State of a quantized model (recipe, coverage, stage), and the order of the stages."""

import logging
from dataclasses import dataclass

import torch
from torch import nn

from ..convert import CoverageReport
from ..ops import Engine
from ..recipe import Recipe

CONVERTED, CALIBRATED, STAGE1, STAGE2 = STAGES = ('converted', 'calibrated', 'stage1', 'stage2')
"""Stages of a model in order; only ``train_stage1`` sets ``stage1``, a custom training loop does
not."""
LOGGER = logging.getLogger('gplq_mm')


@dataclass
class QuantizationState:
    """State that ``gplq_mm.quantize`` stores in a model (attribute ``gplq``).

    Attributes:
        recipe: The resolved recipe, without ``auto``.
        coverage: Operations that are quantized and that stay float.
        engine: Engine that computes training steps.
        is_detector: Whether the settings are those of a detector.
        stage: One of ``STAGES``.
    """

    recipe: Recipe
    coverage: CoverageReport
    engine: Engine
    is_detector: bool
    stage: str = CONVERTED


def state_of(model: nn.Module) -> QuantizationState:
    """State of a quantized model.

    Raises:
        ValueError: If the model is not from ``gplq_mm.quantize``.
    """
    state = getattr(model, 'gplq', None)
    if not isinstance(state, QuantizationState):
        raise ValueError(
            f"{type(model).__name__} is not quantized; write gplq_mm.quantize(model, 'w4a4') first"
        )
    return state


def require_stage(model: nn.Module, allowed: tuple[str, ...]) -> QuantizationState:
    """State of a model in one of the given stages.

    Raises:
        ValueError: If the model is not quantized or in another stage; the message names the call
            to make.
    """
    state = state_of(model)
    if state.stage in allowed:
        return state
    if state.stage == CONVERTED:
        raise ValueError(
            'the model is not calibrated; write gplq_mm.calibrate(model, loader) before this call'
        )
    if state.stage == STAGE2:
        raise ValueError(
            'the weights are already quantized; continue from the calibrated model, for instance '
            'from a copy.deepcopy of it or from gplq_mm.load'
        )
    raise ValueError(
        'the model is already calibrated, and calibration fits its weights; start again with '
        'gplq_mm.quantize of the float model to calibrate on other images'
    )


def device_of(model: nn.Module) -> torch.device:
    """Device of a model's first parameter."""
    return next(model.parameters()).device
