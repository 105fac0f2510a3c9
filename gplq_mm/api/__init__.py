# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Floor 5: quantization of any torch module without MMEngine, exported by ``gplq_mm``."""

from .calibration import CalibrationResult, calibrate
from .checkpoint import load, save
from .conversion import quantize
from .distillation import Distillation, distill
from .model_state import QuantizationState
from .stage1 import stage1_optimizer, train_stage1
from .stage2 import quantize_weights

__all__ = [
    'CalibrationResult',
    'Distillation',
    'QuantizationState',
    'calibrate',
    'distill',
    'load',
    'quantize',
    'quantize_weights',
    'save',
    'stage1_optimizer',
    'train_stage1',
]
