# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Settings that a recipe leaves to the task: ``auto`` means another number for a detector.

A detector has thousands of tokens an image; a classifier has few. A small classifier takes large
steps, smaller ones where stage 1 is short; a pretrained one hardly moves (``docs/accuracy.md``).
"""

import statistics
from typing import Any

from torch import nn

from .recipe import Recipe
from .resolve import RecipeLike, as_recipe

AUTO = 'auto'
MEASURED_ITERATIONS = 390
"""Iterations of stage 1 with which it was chosen."""
MANY_BATCHES = 16
"""Batches that few calibration images are still dealt in."""
PRETRAINED_WIDTH = 192
"""From this width on a classifier is taken for a pretrained one: the smallest published ViT's."""
_PRETRAINED: dict[tuple[str, str], Any] = {
    ('optim', 'lr'): 1e-6,
    ('optim', 'lr_iterations'): 0,
    ('optim', 'vector_lr'): 1e-3,
    ('optim', 'betas'): [0.9, 0.95],
}
"""Larger steps of weights take pretrained features apart, while scales, biases and gains bring them
back (``docs/accuracy.md``); the weights' rate is the paper's at a batch of 16."""
_DETECTOR: dict[tuple[str, str], Any] = {
    ('calibration', 'num_images'): 32,
    ('calibration', 'batch_size'): 1,
    ('optim', 'lr'): 5e-5,
    ('optim', 'lr_iterations'): 0,
    ('optim', 'scale_lr'): 5e-4,
    ('optim', 'vector_lr'): None,
    ('optim', 'betas'): [0.9, 0.999],
    ('optim', 'drop_rates'): 'keep',
}
_CLASSIFIER: dict[tuple[str, str], Any] = {
    ('calibration', 'num_images'): 128,
    ('calibration', 'batch_size'): 8,
    ('optim', 'lr'): 1e-3,
    ('optim', 'lr_iterations'): MEASURED_ITERATIONS,
    ('optim', 'scale_lr'): 1e-3,
    ('optim', 'vector_lr'): None,
    ('optim', 'betas'): [0.9, 0.99],
    ('optim', 'drop_rates'): 'off',
}


def typical_width(model: nn.Module) -> float | None:
    """Median number of inputs of the linear layers; None without any.

    Examples:
        >>> typical_width(nn.Sequential(nn.Linear(8, 4), nn.Linear(8, 32), nn.Linear(32, 8)))
        8
    """
    widths = [m.in_features for m in model.modules() if isinstance(m, nn.Linear)]
    return statistics.median(widths) if widths else None


def _of_width(width: float, is_former: bool) -> dict[tuple[str, str], Any]:
    """What a classifier's width changes of its settings."""
    if is_former:  # the rate fell as the inverse of the width from 128 on
        return {('optim', 'lr'): float(f'{1e-3 * min(1.0, 128 / width):.2g}')}
    return _PRETRAINED if width >= PRETRAINED_WIDTH else {}


def auto_ptq(weight_bits: int, activation_bits: int, is_pretrained: bool) -> Any:
    """What ``weight.ptq='auto'`` means: GPTQ, and fine-tuning after it for a pretrained model.

    Args:
        weight_bits: Below 3, with more for activations, rounding costs more than activations do:
            the target is then that of stage 1 (``asymmetric``).
        activation_bits: Of the recipe.
        is_pretrained: Whether the model is a classifier that is taken for pretrained.

    Examples:
        >>> auto_ptq(4, 4, is_pretrained=False)
        'gptq'
    """
    gptq: dict[str, Any] = {'type': 'gptq'}
    if weight_bits < 3 <= activation_bits:
        gptq['asymmetric'] = True
    if is_pretrained:
        return [{**gptq, 'guided': 0.5}, 'finetune']
    return [gptq] if len(gptq) > 1 else 'gptq'


def ptq_of(recipe: RecipeLike) -> Any:
    """``weight.ptq`` of a recipe, for ``build_weight_ptq``; its ``auto`` as for a small model."""
    found = as_recipe(recipe)
    if found.weight.ptq != AUTO:
        return found.weight.ptq
    return auto_ptq(found.weight.num_bits, found.activation.num_bits, is_pretrained=False)


def settle_auto(recipe: RecipeLike, is_detector: bool, width: float | None = None) -> Recipe:
    """The recipe with numbers in place of ``auto``.

    Args:
        recipe: As for ``as_recipe``.
        is_detector: Whether the model is a detector.
        width: Of ``typical_width``: from ``PRETRAINED_WIDTH`` on a classifier is taken for a
            pretrained one, whose weights and scales move less.

    A learning rate that the recipe gives as a number is taken as it is: ``lr_iterations`` is 0
    then unless it is given too.

    Examples:
        >>> settle_auto('w4a4', is_detector=True).optim.lr
        5e-05
        >>> settle_auto('w4a4', is_detector=False, width=384).optim.lr
        1e-06
    """
    given = as_recipe(recipe)
    settled = given.as_dict()
    if given.optim.lr != AUTO and given.optim.lr_iterations == AUTO:
        settled['optim']['lr_iterations'] = 0
    values = dict(_DETECTOR if is_detector else _CLASSIFIER)
    if not is_detector and width is not None:
        values |= _of_width(width, is_former='scale_step' not in settled['optim'])
    is_pretrained = not is_detector and width is not None and width >= PRETRAINED_WIDTH
    bits = given.weight.num_bits, given.activation.num_bits
    values[('weight', 'ptq')] = auto_ptq(*bits, is_pretrained)
    for (section, key), value in values.items():
        if settled[section].get(key) == AUTO:
            _settle(settled[section], key, value)
    return Recipe.from_dict(settled, 'recipe')


def _settle(settings: dict[str, Any], key: str, value: Any) -> None:
    if key == 'batch_size':  # enough batches for several GPUs, whatever their number
        value = max(1, min(value, settings['num_images'] // MANY_BATCHES))
    settings[key] = value
    if key == 'num_images':  # nobody asked for a number: a small set gives what it has
        settings.setdefault('all_if_fewer', True)
