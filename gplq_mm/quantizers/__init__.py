# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Quantizers of 2 to 8 bits with uniform or logarithmic codes, and observers, in plain torch."""

from .fake_quantizer import FakeQuantizer
from .functional import dequantize, integer_range, quantize
from .observers import OBSERVERS, Observer, build_observer, qparams_from_range, register_observer
from .quantizer_state import UncalibratedError
from .spec import Granularity, PerChannel, PerRow, PerTensor, QuantSpec

__all__ = [
    'OBSERVERS',
    'FakeQuantizer',
    'Granularity',
    'Observer',
    'PerChannel',
    'PerRow',
    'PerTensor',
    'QuantSpec',
    'UncalibratedError',
    'build_observer',
    'dequantize',
    'integer_range',
    'qparams_from_range',
    'quantize',
    'register_observer',
]
