# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Floor 2: from a float model and a recipe to a model with quantizers."""

from .convert import (
    CoverageReport,
    convert_,
    default_scope,
    quantized_layers,
    quantizers,
    set_quantization,
)
from .handlers import Context, find_handler, make_matmul, register_handler, register_layer
from .presets import PRESETS
from .recipe import recipe_difference, resolve_recipe

__all__ = [
    'PRESETS',
    'Context',
    'CoverageReport',
    'convert_',
    'default_scope',
    'find_handler',
    'make_matmul',
    'quantized_layers',
    'quantizers',
    'recipe_difference',
    'register_handler',
    'register_layer',
    'resolve_recipe',
    'set_quantization',
]
