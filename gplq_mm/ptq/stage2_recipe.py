# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Settings of the recipe's ``stage2`` section for a model."""

from typing import Any

from torch import nn

from ..convert.model_facts import facts_of
from ..recipe import CompensationSettings, RecipeLike, as_recipe
from ..stream.blocks import is_block


def resolve_compensation(model: nn.Module, recipe: RecipeLike) -> dict[str, Any] | None:
    """Options of a recipe's compensation.

    Args:
        model: Converted model; ``auto`` means ``qwt`` if it has transformer blocks, and None if
            an integration says that it is not to be compensated (``ModelFacts``).
        recipe: ``stage2.compensation`` is None, ``auto``, ``qwt``
            or ``dict(type=..., blocks=..., ridge=..., target=...)``.

    Returns:
        ``blocks``, ``ridge`` and ``target``, or None for no compensation.

    Raises:
        ValueError: If the recipe is not valid.
    """
    setting = as_recipe(recipe).after_training.compensation
    if setting is None:
        return None
    options = CompensationSettings(type=setting) if isinstance(setting, str) else setting
    is_auto = options.type == 'auto'
    if is_auto and not (facts_of(model).compensates and any(map(is_block, model.modules()))):
        return None
    blocks = options.blocks if isinstance(options.blocks, str) else list(options.blocks)
    return {'blocks': blocks, 'ridge': options.ridge, 'target': options.target}
