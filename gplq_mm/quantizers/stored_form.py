# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Granularity and codes of a quantizer's stored state."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from .spec import PerChannel, PerRow, PerTensor, QuantSpec

_MARKS = ('row_axis', 'levels')
"""Keys of ``PerRow`` scales and logarithmic codes; a state without is static and uniform."""


def stored_spec(
    spec: QuantSpec, state: Mapping[str, Any], prefix: str = '', axis: int | None = None
) -> QuantSpec:
    """``spec`` with granularity and codes of a stored state that is static and uniform.

    Args:
        spec: Spec of the quantizer that the state is loaded into.
        state: State dict.
        prefix: Prefix of the quantizer's keys.
        axis: Channel axis, if ``spec`` is per tensor and the state may have one scale per
            channel.

    Returns:
        ``spec`` itself if the state has no scale, ``PerRow`` scales or logarithmic codes.

    Examples:
        >>> import torch
        >>> state = {'scale': torch.ones(2)}  # one scale per head
        >>> stored_spec(QuantSpec(granularity=PerRow()), state).granularity
        PerChannel(axis=1)
    """
    scale = state.get(prefix + 'scale')
    if scale is None or any(prefix + mark in state for mark in _MARKS):
        return spec
    granularity = spec.granularity
    if scale.dim() == 0:
        granularity = PerTensor()
    elif isinstance(granularity, PerRow):
        granularity = PerChannel(1)
    elif isinstance(granularity, PerTensor) and axis is not None:
        granularity = PerChannel(axis)
    codes = 'uniform' if spec.is_log else spec.codes
    return dataclasses.replace(spec, granularity=granularity, codes=codes)


def require_same_form(own: Mapping[str, Any], state: Mapping[str, Any], prefix: str = '') -> None:
    """Refuse a stored state of another granularity or kind of codes.

    Args:
        own: State dict of the quantizer itself.
        state: State dict to load; without the quantizer's scale it is not checked.
        prefix: Prefix of the quantizer's keys in ``state``.

    Raises:
        ValueError: If the shape of the scale, or the kind of codes, differs.
    """
    if prefix + 'scale' not in state:
        return
    keys = ('scale', *_MARKS)
    stored = _form({k: state[prefix + k] for k in keys if prefix + k in state})
    if stored != _form(own):
        raise ValueError(
            f'{prefix}scale: the checkpoint holds {stored}, this config has {_form(own)}; '
            'use the config that the checkpoint was made with'
        )


def _form(state: Mapping[str, Any]) -> str:
    """Text for messages, such as ``uniform codes with scales of shape (6,)``."""
    codes = 'logarithmic' if 'levels' in state else 'uniform'
    scales = f'scales of shape {tuple(state["scale"].shape)}'
    if 'row_axis' in state:
        scales = f'a scale per vector of axis {int(state["row_axis"])}'
    return f'{codes} codes with {scales}'
