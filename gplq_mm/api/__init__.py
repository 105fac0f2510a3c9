# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Quantization of any torch module without MMEngine, exported by ``gplq_mm``."""

from .calibrating import CalibrationResult, calibrate
from .deploying import deploy
from .distilling import Distillation, distill
from .model_state import QuantizationState
from .quantizing import quantize
from .saving import load, save
from .training import stage1_optimizer, train_stage1
from .weights import quantize_weights

__all__ = [
    'CalibrationResult',
    'Distillation',
    'QuantizationState',
    'calibrate',
    'deploy',
    'distill',
    'load',
    'quantize',
    'quantize_weights',
    'save',
    'stage1_optimizer',
    'train_stage1',
]
