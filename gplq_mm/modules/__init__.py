# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Floor 1: layers that quantize their operands, in plain torch."""

from .attention import quant_scaled_dot_product_attention, quantized_attention
from .conv import QuantConv2d, QuantConvTranspose2d
from .engine import Engine, resolve_engine, set_engine
from .layer import QuantizedLayer, swap_class, weight_rows
from .linear import QuantLinear, biased_qkv, linear_with_bias
from .matmul import QuantMatMul

__all__ = [
    'Engine',
    'QuantConv2d',
    'QuantConvTranspose2d',
    'QuantLinear',
    'QuantMatMul',
    'QuantizedLayer',
    'biased_qkv',
    'linear_with_bias',
    'quant_scaled_dot_product_attention',
    'quantized_attention',
    'resolve_engine',
    'set_engine',
    'swap_class',
    'weight_rows',
]
