# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Named recipes. ``gplq_w4a4_paper`` follows the paper; the others are ours."""

import copy
from typing import Any

_FORMER: dict[str, Any] = {
    'scope': 'auto',
    'activation': {
        'num_bits': 4,
        'signed': True,
        'symmetric': False,
        'granularity': 'per_tensor',
        'observer': 'mse',
        'observer_args': {},
        'learn_scale': True,
    },
    'weight': {
        'num_bits': 4,
        'signed': True,
        'symmetric': True,
        'granularity': 'per_channel',
        'observer': 'minmax',
        'observer_args': {},
        'learn_scale': False,
        'ptq': 'gptq',
        'qat': False,
    },
    'rules': [
        {'role': 'softmax', 'activation': {'signed': False, 'symmetric': True}, 'optional': True},
        {'role': 'image', 'num_bits': 8, 'optional': True},
        {'role': 'predictor', 'num_bits': 8, 'optional': True},
    ],
    'calibration': {'num_images': 'auto', 'seed': 0, 'batch_size': 1},
    'mimic': {'type': 'auto', 'loss_weight': 1.0},
    'optim': {
        'lr': 'auto',
        'lr_iterations': 'auto',
        'scale_lr': 'auto',
        'weight_decay': 0.0,
        'scale_weight_decay': 0.0,
        'betas': 'auto',
        'train': 'all',
        'drop_rates': 'auto',
    },
    'stage2': {'compensation': None},
}
"""What the presets were before input scales followed channels and attention rows."""

_ROWS: dict[str, Any] = {'granularity': 'per_row'}
_RULES: list[dict[str, Any]] = [
    *({'role': r, 'activation': _ROWS, 'optional': True} for r in ('query', 'key', 'value')),
    {
        'role': 'softmax',
        'activation': {**_ROWS, 'signed': False, 'symmetric': True, 'codes': 'auto'},
        'optional': True,
    },
    {
        'role': 'image',
        'num_bits': 8,
        'activation': {'granularity': 'per_tensor'},
        'optional': True,
    },
    {'role': 'predictor', 'num_bits': 8, 'optional': True},
]


def _ours() -> dict[str, Any]:
    """Input scales a channel, migrated; attention scales a row; gate."""
    recipe = copy.deepcopy(_FORMER)
    recipe['activation'].update(granularity='per_channel', codes='uniform')
    recipe['rules'] = copy.deepcopy(_RULES)
    recipe['calibration'].update(batch_size='auto', migrate=True, compensate=True)
    recipe['gate'] = {'num_images': 32, 'max_feature_error': 0.5, 'action': 'stop'}
    recipe['optim'].update(scale_step='relative', vector_lr='auto')
    recipe['weight']['ptq'] = 'auto'
    return recipe


def _with_bits(base: dict[str, Any], weight: int, activation: int) -> dict[str, Any]:
    recipe = copy.deepcopy(base)
    recipe['name'] = f'w{weight}a{activation}'
    recipe['weight']['num_bits'] = weight
    recipe['activation']['num_bits'] = activation
    if weight < 3 <= activation and recipe['weight']['ptq'] != 'auto':
        recipe['weight']['ptq'] = [{'type': 'gptq', 'asymmetric': True}]
    return recipe


def _auto() -> dict[str, Any]:
    """``w4a4``; the roles that cost most get more bits where the gate is not passed."""
    recipe = _with_bits(_ours(), 4, 4)
    recipe['name'] = 'auto'
    recipe['gate']['action'] = 'add_bits'
    return recipe


def _paper(bits: int) -> dict[str, Any]:
    """Section 4 of arXiv 2506.11784: signed symmetric per-channel, min-max, LR 5e-6, PCA, QwT."""
    recipe = _with_bits(_FORMER, bits, bits)
    recipe['name'] = f'gplq_w{bits}a{bits}_paper'
    recipe['activation'].update(symmetric=True, granularity='per_channel', observer='minmax')
    recipe['weight']['ptq'] = 'percentile'
    recipe['rules'] = [r for r in recipe['rules'] if r['role'] != 'softmax']
    recipe['calibration']['num_images'] = 128
    recipe['mimic'] = {'type': 'paper', 'loss_weight': 1.0, 'explained_variance': 0.6}
    recipe['optim'].update(
        lr=5e-6, lr_iterations=0, scale_lr=5e-6, betas=[0.9, 0.999], drop_rates='keep'
    )
    recipe['stage2'] = {'compensation': 'auto'}
    return recipe


_BITS = ((2, 2), (2, 4), (3, 3), (4, 4), (4, 8), (8, 8))
PRESETS: dict[str, dict[str, Any]] = {
    recipe['name']: recipe
    for recipe in (
        *(_with_bits(_ours(), w, a) for w, a in _BITS),
        _auto(),
        _paper(4),
        _paper(3),
    )
}
"""Preset by name: ``wXaY`` is X-bit weights and Y-bit activations; ``auto`` begins as ``w4a4``."""

FORMER_PRESETS: dict[str, dict[str, Any]] = {
    recipe['name']: recipe for recipe in (_with_bits(_FORMER, w, a) for w, a in _BITS)
}
"""What ``wXaY`` meant before; checkpoints made with them still load."""

FORMER_SUFFIX = '_v1'
PRESETS |= {
    f'{name}{FORMER_SUFFIX}': {**copy.deepcopy(recipe), 'name': f'{name}{FORMER_SUFFIX}'}
    for name, recipe in FORMER_PRESETS.items()
}
