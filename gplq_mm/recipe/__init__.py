# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The typed recipe, its presets, and its validation."""

from .auto_settings import AUTO, ptq_of, settle_auto, typical_width
from .former import former_base, former_counterpart, is_former
from .match import RuleBook, in_scope, sets_bits
from .presets import FORMER_PRESETS, PRESETS
from .recipe import Recipe, scope_prefixes
from .resolve import RecipeLike, as_recipe, recipe_difference, resolve_recipe
from .sections.mimic import MimicTerm, mimic_terms
from .sections.operand_settings import (
    ActivationSettings,
    OperandSettings,
    WeightSettings,
    spec_from_settings,
)
from .sections.rule import ROLES, Rule
from .sections.run_settings import (
    CalibrationSettings,
    CompensationSettings,
    GateSettings,
    OptimSettings,
    Stage2Settings,
)
from .sections.section import plain

__all__ = [
    'AUTO',
    'FORMER_PRESETS',
    'PRESETS',
    'ROLES',
    'ActivationSettings',
    'CalibrationSettings',
    'CompensationSettings',
    'GateSettings',
    'MimicTerm',
    'OperandSettings',
    'OptimSettings',
    'Recipe',
    'RecipeLike',
    'Rule',
    'RuleBook',
    'Stage2Settings',
    'WeightSettings',
    'as_recipe',
    'former_base',
    'former_counterpart',
    'in_scope',
    'is_former',
    'mimic_terms',
    'plain',
    'ptq_of',
    'recipe_difference',
    'resolve_recipe',
    'scope_prefixes',
    'sets_bits',
    'settle_auto',
    'spec_from_settings',
    'typical_width',
]
