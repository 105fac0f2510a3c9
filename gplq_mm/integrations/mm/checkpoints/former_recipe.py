# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Run checkpoints of earlier preset versions with a config that names the current ones."""

from collections.abc import Mapping
from typing import Any

from mmengine.logging import print_log

from ....convert import quantizers
from ....recipe import as_recipe, former_counterpart
from ....recipe.recorded import recorded_recipe
from .run_checkpoint import KEY, is_quantized_checkpoint, recipe_differences, state_dict_of


def take_former_form_(model: Any, checkpoint: Mapping[str, Any]) -> None:
    """Give a model the quantizers of a checkpoint made with an earlier version of its preset.

    Does nothing for any other checkpoint, or if the recipe differs in more than the preset's
    version; ``check_quantized`` then says what differs. Not for training: the optimizer follows
    the current recipe.

    Args:
        model: Converted model; its quantizers and ``gplq.recipe`` change.
        checkpoint: Loaded checkpoint.
    """
    if not is_quantized_checkpoint(checkpoint):
        return
    recipe = model.gplq.recipe
    made_with = recorded_recipe(checkpoint[KEY]['recipe'])
    former = former_counterpart(recipe.as_dict(), made_with)
    if former is None or recipe_differences(checkpoint, former):
        return
    state = state_dict_of(checkpoint)
    for name, quantizer in quantizers(model, 'activation').items():
        quantizer.take_form_of(state, f'{name}.')
    model.gplq.recipe = as_recipe(former)
    print_log(
        f'the checkpoint was made with an earlier version of recipe {recipe.name!r}: the '
        f'quantizers take its form, the recipe is now {former["name"]!r}',
        logger='current',
    )
