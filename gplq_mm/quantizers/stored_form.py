# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""What a quantizer's stored state says of its granularity and codes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from .spec import PerChannel, PerRow, PerTensor, QuantSpec

_MARKS = ('row_axis', 'levels')
"""Keys that state scales a vector and logarithmic codes; a state without is static and uniform."""


def stored_spec(
    spec: QuantSpec, state: Mapping[str, Any], prefix: str = '', axis: int | None = None
) -> QuantSpec:
    """``spec``, with granularity and codes of a stored state that is static and uniform.

    Args:
        spec: Of the quantizer that the state is loaded into.
        state: State dict.
        prefix: Of the quantizer's keys in it.
        axis: Channel axis, where ``spec`` is per-tensor and the state may hold one scale a
            channel.

    Returns:
        ``spec`` itself where the state holds no scale, or is of scales a vector or of
        logarithmic codes.

    Examples:
        >>> import torch
        >>> state = {'scale': torch.ones(2)}  # one scale a head
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
    """Refuse a stored state of another granularity or code.

    Args:
        own: State dict of the quantizer itself.
        state: State dict to load; without the quantizer's scale it is left alone.
        prefix: Of the quantizer's keys in ``state``.

    Raises:
        ValueError: If scales, or the kind of codes, differ.
    """
    if prefix + 'scale' not in state:
        return
    keys = ('scale', *_MARKS)
    stored = _form({k: state[prefix + k] for k in keys if prefix + k in state})
    if stored != _form(own):
        raise ValueError(
            f'{prefix}scale: the checkpoint holds {stored}, this config asks for {_form(own)}; '
            'use the config that the checkpoint was made with'
        )


def _form(state: Mapping[str, Any]) -> str:
    """In words, such as ``uniform codes with scales of shape (6,)``."""
    codes = 'logarithmic' if 'levels' in state else 'uniform'
    scales = f'scales of shape {tuple(state["scale"].shape)}'
    if 'row_axis' in state:
        scales = f'a scale for each vector of axis {int(state["row_axis"])}'
    return f'{codes} codes with {scales}'
