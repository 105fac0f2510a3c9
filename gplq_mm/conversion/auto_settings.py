# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Settings that a recipe leaves to the task: ``auto`` means another number for a detector.

A detector has thousands of tokens an image; a classifier has few and takes larger steps, the
wider it is and the shorter stage 1 the smaller (``docs/accuracy.md``).
"""

import copy
import statistics
from collections.abc import Mapping
from typing import Any

from torch import nn

AUTO = 'auto'
MEASURED_WIDTH = 128
"""Width of the classifier on which the learning rate was chosen."""
MEASURED_ITERATIONS = 390
"""Iterations of stage 1 with which it was chosen."""
_DETECTOR: dict[tuple[str, str], Any] = {
    ('calibration', 'num_images'): 32,
    ('calibration', 'batch_size'): 1,
    ('optim', 'lr'): 5e-5,
    ('optim', 'lr_iterations'): 0,
    ('optim', 'scale_lr'): 5e-4,
    ('optim', 'betas'): [0.9, 0.999],
    ('optim', 'drop_rates'): 'keep',
}
_CLASSIFIER: dict[tuple[str, str], Any] = {
    ('calibration', 'num_images'): 128,
    ('calibration', 'batch_size'): 8,
    ('optim', 'lr'): 1e-3,
    ('optim', 'lr_iterations'): MEASURED_ITERATIONS,
    ('optim', 'scale_lr'): 1e-3,
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


def may_be_auto(section: str, key: str) -> bool:
    """Whether ``recipe[section][key]`` may be ``auto``.

    Examples:
        >>> may_be_auto('optim', 'lr'), may_be_auto('optim', 'train')
        (True, False)
    """
    return (section, key) in _DETECTOR


def settle_auto(
    recipe: Mapping[str, Any], is_detector: bool, width: float | None = None
) -> dict[str, Any]:
    """The recipe with numbers in place of ``auto``.

    Args:
        recipe: Resolved recipe.
        is_detector: Whether the model is a detector.
        width: Of ``typical_width``: a classifier's learning rate falls as its inverse from
            ``MEASURED_WIDTH`` on, as Adam's steps should (arXiv 2203.03466, table 3).

    A learning rate that the recipe gives as a number is taken as it is: ``lr_iterations`` is 0
    then unless it is given too.

    Examples:
        >>> settle_auto({'optim': {'lr': 'auto'}}, is_detector=True)
        {'optim': {'lr': 5e-05}}
        >>> settle_auto({'optim': {'lr': 'auto'}}, is_detector=False, width=384)
        {'optim': {'lr': 0.00033}}
    """
    settled = copy.deepcopy(dict(recipe))
    optim = settled.get('optim', {})
    if optim.get('lr') != AUTO and optim.get('lr_iterations') == AUTO:
        optim['lr_iterations'] = 0
    for (section, key), value in (_DETECTOR if is_detector else _CLASSIFIER).items():
        if settled.get(section, {}).get(key) == AUTO:
            if (section, key) == ('optim', 'lr') and width and not is_detector:
                value = float(f'{value * min(1.0, MEASURED_WIDTH / width):.2g}')
            settled[section][key] = copy.copy(value)
            if key == 'num_images':  # nobody asked for a number: a small set gives what it has
                settled[section]['all_if_fewer'] = True
    return settled
