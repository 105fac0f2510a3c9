# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Weights that stage 1 trains. Learned scales always train, except in frozen stages.

``projection`` follows APLA (arXiv 2503.11335): training only the output projection of each
attention is as accurate as training all weights, and cheaper.
"""

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from ..convert import quantizers
from .optimizer_groups import biases_and_gains

TRAIN = ('all', 'attention', 'projection', 'vectors', 'none')
_ATTENTION = ('attn', 'attention', 'self_attn', 'cross_attn')
_PROJECTION = ('proj', 'out_proj')


def choose_trained_(model: nn.Module, train: str | Sequence[str]) -> list[str]:
    """Freeze the weights that stage 1 does not train: they get no gradient.

    A weight that the model has frozen stays frozen.

    Args:
        model: Converted model; changed in place.
        train: ``all``; ``attention`` for all weights inside attention modules;
            ``projection`` for their output projections; ``vectors`` for biases, normalization
            and LayerScale; ``none`` for the scales only; or shell patterns of parameter names.

    Returns:
        Names of the weights that train.

    Raises:
        ValueError: If ``train`` is none of these, or matches no weight.
    """
    scales = {id(p) for q in quantizers(model).values() for p in q.parameters()}
    weights = {n: p for n, p in model.named_parameters() if id(p) not in scales}
    if train == 'vectors':
        chosen = set(biases_and_gains(model))
    else:
        chosen = _chosen(list(weights), train)
    for name, parameter in weights.items():
        if name not in chosen:
            parameter.requires_grad_(False)
    return [name for name in weights if weights[name].requires_grad]


def freeze_stages_(model: nn.Module) -> list[str]:
    """Let the model freeze its ``frozen_stages``, including quantizer scales.

    Backbones of mmpretrain and mmdet freeze in every ``train()``. Call it before the optimizer
    or a DDP wrapper is created, so that these exclude parameters without gradients.

    Args:
        model: Converted model; it is in training mode afterwards.

    Returns:
        Names of the scales that keep their calibrated values.
    """
    learned = {n: q for n, q in quantizers(model).items() if q.scale.requires_grad}
    model.train()
    return [n for n, q in learned.items() if not q.scale.requires_grad]


def is_in_attention(name: str) -> bool:
    """Whether a parameter is inside an attention module, by its dotted name.

    Examples:
        >>> is_in_attention('layers.0.attn.qkv.weight'), is_in_attention('layers.0.ffn.weight')
        (True, False)
    """
    return any(part in _ATTENTION for part in name.split('.')[:-1])


def is_in_projection(name: str) -> bool:
    """Whether a parameter belongs to the output projection of an attention module.

    Examples:
        >>> is_in_projection('attn.w_msa.proj.weight'), is_in_projection('patch_embed.proj.weight')
        (True, False)
    """
    return is_in_attention(name) and name.split('.')[-2] in _PROJECTION


def _chosen(names: list[str], train: str | Sequence[str]) -> set[str]:
    if train == 'all':
        return set(names)
    if train == 'none':
        return set()
    if isinstance(train, str) and train in TRAIN:
        inside = is_in_attention if train == 'attention' else is_in_projection
        found = {name for name in names if inside(name)}
        if not found:
            raise ValueError(
                f'recipe.optim.train={train!r} matches no weight: the model has no module named '
                f"{' or '.join(_ATTENTION)}; write patterns such as ['backbone.*.proj.*']"
            )
        return found
    if isinstance(train, str) or not all(isinstance(pattern, str) for pattern in train):
        raise ValueError(
            f'recipe.optim.train={train!r}: write one of {TRAIN}, or a list of patterns of '
            "parameter names such as ['backbone.layers.*.attn.*']"
        )
    found = set()
    for pattern in train:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            close = difflib.get_close_matches(pattern, names, n=2, cutoff=0.3) or names[:2]
            raise ValueError(
                f'recipe.optim.train: {pattern!r} matches no weight; there are, for example, '
                f'{" and ".join(close)}'
            )
        found |= matched
    return found
