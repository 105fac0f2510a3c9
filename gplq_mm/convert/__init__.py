# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Conversion of a float model to a model with quantizers, by a recipe."""

from ..recipe import PRESETS, recipe_difference, resolve_recipe, settle_auto, typical_width
from .attention_handlers import (
    POSITION_MLP,
    attach_matmuls,
    attach_rel_pos_matmuls,
    register_attention,
)
from .handlers import Context, find_handler, make_matmul, register_handler, register_layer
from .model_facts import ModelFacts, facts_of, register_model_facts
from .roles import (
    child_name,
    register_ffn,
    register_roles,
    set_ffn_roles,
    set_predictor_roles,
)
from .state_keys import state_keys
from .walk import (
    CoverageReport,
    convert_,
    floating,
    quantized_layers,
    quantizers,
    set_quantization,
)

__all__ = [
    'POSITION_MLP',
    'PRESETS',
    'Context',
    'CoverageReport',
    'ModelFacts',
    'attach_matmuls',
    'attach_rel_pos_matmuls',
    'child_name',
    'convert_',
    'facts_of',
    'find_handler',
    'floating',
    'make_matmul',
    'quantized_layers',
    'quantizers',
    'recipe_difference',
    'register_attention',
    'register_ffn',
    'register_handler',
    'register_layer',
    'register_model_facts',
    'register_roles',
    'resolve_recipe',
    'set_ffn_roles',
    'set_predictor_roles',
    'set_quantization',
    'settle_auto',
    'state_keys',
    'typical_width',
]
