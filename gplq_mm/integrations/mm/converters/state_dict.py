# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Rename the keys of a state dict, and compare it with the one a model expects."""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

MAX_NAMES = 12


def rename(key: str, rules: Iterable[tuple[str, str]]) -> str:
    """Apply the first rule whose pattern occurs in a key.

    Args:
        key: Name of a tensor.
        rules: Regular expressions, each with its replacement.

    Returns:
        The new name; the old one if no rule matches.

    Example:
        >>> rename('blocks.3.mlp.fc1.bias', [('mlp.fc1', 'ffn.0'), ('fc', 'linear')])
        'blocks.3.ffn.0.bias'
    """
    for pattern, replacement in rules:
        renamed, hits = re.subn(pattern, replacement, key)
        if hits:
            return renamed
    return key


def check_state_dict(found: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Require exactly the target's names and shapes.

    Args:
        found: State dict to check.
        target: State dict whose names and shapes are required.

    Raises:
        ValueError: If any name is unexpected, missing or of another shape; the message has the
            first 12 of each kind.
    """
    problems = {
        'unexpected, the target has no such key': found.keys() - target.keys(),
        'missing in the checkpoint': target.keys() - found.keys(),
        'of another shape': {
            f'{key} {tuple(found[key].shape)}, target {tuple(target[key].shape)}'
            for key in found.keys() & target.keys()
            if found[key].shape != target[key].shape
        },
    }
    lines = [f'{len(keys)} {what}: {_list(keys)}' for what, keys in problems.items() if keys]
    if lines:
        raise ValueError('the checkpoint does not fit the target model\n  ' + '\n  '.join(lines))


def _list(keys: Iterable[str]) -> str:
    names = sorted(keys)
    rest = f' and {len(names) - MAX_NAMES} more' if len(names) > MAX_NAMES else ''
    return ', '.join(names[:MAX_NAMES]) + rest
