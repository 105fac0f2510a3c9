# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""From a float model to one that is ready for calibration, for the builder and for any caller."""

from torch import nn

from ..compat.torch import before_load_state_dict
from ..convert import CoverageReport, convert_, facts_of
from ..deployment.packed_file import unpack_keys
from ..distillation.drop_rates import set_drop_rates_
from ..distillation.trainable import choose_trained_, freeze_stages_
from ..ptq.stage2 import prepare_stage2
from ..recipe import Recipe, RecipeLike, as_recipe, settle_auto, typical_width


def settle_for(model: nn.Module, recipe: RecipeLike) -> tuple[Recipe, bool]:
    """A recipe with its scope and all its ``auto`` settled for a model.

    Args:
        model: Float model.
        recipe: Preset or recipe.

    Returns:
        The recipe, and whether the model is a detector.

    Raises:
        ValueError: If the recipe is not valid.
    """
    settled, facts = as_recipe(recipe), facts_of(model)
    if settled.scope == 'auto':
        settled = settled.change(scope=facts.scope)
    return settle_auto(settled, facts.is_detector, typical_width(model)), facts.is_detector


def prepare_(
    model: nn.Module, recipe: Recipe, strict: bool = False
) -> tuple[CoverageReport, list[str]]:
    """Attach quantizers and what stage 2 adds, and settle what trains, in place.

    The model's ``load_state_dict`` takes packed state dicts from then on.

    Args:
        model: Float model; it is in training mode afterwards.
        recipe: Of ``settle_for``.
        strict: Raise if an unknown layer or attention class stays float.

    Returns:
        What is quantized and what stays float, and the scales in frozen stages.

    Raises:
        ValueError: See ``convert_``, ``prepare_stage2`` and ``choose_trained_``.
    """
    coverage = convert_(model, recipe, strict=strict)
    prepare_stage2(model, recipe)
    choose_trained_(model, recipe.optim.train)
    set_drop_rates_(model, recipe.optim.drop_rates)
    before_load_state_dict(model, unpack_keys, first=True)
    return coverage, freeze_stages_(model)
