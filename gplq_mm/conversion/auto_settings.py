# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Settings that a recipe leaves to the task: ``auto`` means another number for a detector.

A detector has thousands of tokens an image; a classifier has few and takes larger steps
(``docs/accuracy.md``).
"""

import copy
from collections.abc import Mapping
from typing import Any

AUTO = 'auto'
_DETECTOR: dict[tuple[str, str], Any] = {
    ('calibration', 'num_images'): 32,
    ('optim', 'lr'): 5e-5,
    ('optim', 'scale_lr'): 5e-4,
    ('optim', 'betas'): [0.9, 0.999],
    ('optim', 'drop_rates'): 'keep',
}
_CLASSIFIER: dict[tuple[str, str], Any] = {
    ('calibration', 'num_images'): 128,
    ('optim', 'lr'): 3e-4,
    ('optim', 'scale_lr'): 1e-3,
    ('optim', 'betas'): [0.9, 0.99],
    ('optim', 'drop_rates'): 'off',
}


def may_be_auto(section: str, key: str) -> bool:
    """Whether ``recipe[section][key]`` may be ``auto``.

    Examples:
        >>> may_be_auto('optim', 'lr'), may_be_auto('optim', 'train')
        (True, False)
    """
    return (section, key) in _DETECTOR


def settle_auto(recipe: Mapping[str, Any], is_detector: bool) -> dict[str, Any]:
    """The recipe with numbers in place of ``auto``.

    Args:
        recipe: Resolved recipe.
        is_detector: Whether the model is a detector.

    Examples:
        >>> settle_auto({'optim': {'lr': 'auto'}}, is_detector=True)
        {'optim': {'lr': 5e-05}}
    """
    settled = copy.deepcopy(dict(recipe))
    for (section, key), value in (_DETECTOR if is_detector else _CLASSIFIER).items():
        if settled.get(section, {}).get(key) == AUTO:
            settled[section][key] = copy.copy(value)
            if key == 'num_images':  # nobody asked for a number: a small set gives what it has
                settled[section]['all_if_fewer'] = True
    return settled
