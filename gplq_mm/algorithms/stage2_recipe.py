# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""What the recipe's ``stage2`` section means for a model."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from .blocks import is_block
from .qwt import TARGETS

_HEADS = ('roi_head', 'bbox_head', 'rpn_head')
_DEFAULTS: dict[str, Any] = {'blocks': 'auto', 'ridge': 1e-4, 'target': TARGETS[0]}


def resolve_compensation(model: nn.Module, recipe: Mapping[str, Any]) -> dict[str, Any] | None:
    """Options of the compensation that a recipe asks for.

    Args:
        model: Converted model; ``auto`` means ``qwt`` for a classifier with
            transformer blocks and None for a detector, as in arXiv 2506.11784.
        recipe: Resolved recipe; ``stage2.compensation`` is None, ``auto``, ``qwt``
            or ``dict(type=..., blocks=..., ridge=..., target=...)``.

    Returns:
        ``blocks``, ``ridge`` and ``target``, or None for no compensation.

    Raises:
        ValueError: For an unknown key or type.
    """
    stage2 = dict(recipe.get('stage2') or {})
    setting = stage2.pop('compensation', None)
    stage2.pop('num_images', None)
    if stage2:
        raise ValueError(
            f'recipe.stage2 has no key {min(stage2)!r}; the keys are [compensation, num_images]'
        )
    stage2_images(recipe)
    if setting is None:
        return None
    options = {'type': setting} if isinstance(setting, str) else dict(setting)
    kind = options.pop('type', 'qwt')
    unknown = sorted(set(options) - set(_DEFAULTS))
    if kind not in ('auto', 'qwt') or unknown:
        raise ValueError(
            f'stage2.compensation={setting!r}: write None, "auto", "qwt" or '
            f'dict(type="qwt", ...) with the keys {sorted(_DEFAULTS)}'
        )
    if kind == 'auto' and (_is_detector(model) or not any(map(is_block, model.modules()))):
        return None
    return {**_DEFAULTS, **options}


def stage2_images(recipe: Mapping[str, Any]) -> int | None:
    """Images that stage 2 uses; None for those of the calibration.

    Raises:
        ValueError: If ``stage2.num_images`` is no positive integer.

    Examples:
        >>> stage2_images(dict(stage2=dict(num_images=128))), stage2_images({})
        (128, None)
    """
    number = (recipe.get('stage2') or {}).get('num_images')
    if number is not None and (not isinstance(number, int) or number < 1):
        raise ValueError(
            f'recipe.stage2.num_images={number!r}: write a positive integer, or leave it out to '
            'use the images of the calibration'
        )
    return number


def _is_detector(model: nn.Module) -> bool:
    return any(getattr(model, head, None) is not None for head in _HEADS)
