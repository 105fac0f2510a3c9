# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Operations with quantized operands, in plain torch."""

from . import backends
from .attention.products import Attention, quant_scaled_dot_product_attention, quantized_attention
from .conv import QuantConv2d, QuantConvTranspose2d
from .dispatch import explain, not_quantized, register_backend, unregister_backend
from .engine import Engine, resolve_engine, set_engine
from .linear import (
    QuantizedLayer,
    QuantLinear,
    biased_qkv,
    linear_with_bias,
    swap_class,
    weight_rows,
)
from .matmul import QuantMatMul
from .operation import Codes, Operand, Operation, operations

__all__ = [
    'Attention',
    'Codes',
    'Engine',
    'Operand',
    'Operation',
    'QuantConv2d',
    'QuantConvTranspose2d',
    'QuantLinear',
    'QuantMatMul',
    'QuantizedLayer',
    'backends',
    'biased_qkv',
    'explain',
    'linear_with_bias',
    'not_quantized',
    'operations',
    'quant_scaled_dot_product_attention',
    'quantized_attention',
    'register_backend',
    'resolve_engine',
    'set_engine',
    'swap_class',
    'unregister_backend',
    'weight_rows',
]
