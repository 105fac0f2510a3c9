# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Figures of single layers along the depth of a model."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def short_names(names: Sequence[str]) -> list[str]:
    """Names without the dotted prefix that all of them share.

    Examples:
        >>> short_names(['a.b.fc1', 'a.b.fc2']), short_names(['a.fc'])
        (['fc1', 'fc2'], ['a.fc'])
    """
    if len(names) < 2:
        return list(names)
    split = [name.split('.') for name in names]
    shared = 0
    while all(len(s) > shared + 1 and s[shared] == split[0][shared] for s in split):
        shared += 1
    return ['.'.join(s[shared:]) for s in split]


def sqnr_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Signal-to-noise ratios of the layers, in model order, for ``line_chart``.

    Weights are those of stage 2. Inputs and outputs are those of calibration by layer: the error
    of the rounded input alone, and of the layer's output with weights fitted to it, before any
    training.
    """
    weights = report.get('stage2', {}).get('weights', {}).get('layers', {})
    calibrated = report.get('calibration', {}).get('layers', {})
    order = {name: i for i, name in enumerate(dict.fromkeys([*weights, *calibrated]))}
    values = {
        'weight': {n: about['weight_sqnr_db'] for n, about in weights.items()},
        'input': {n: _db(about.get('activation_error')) for n, about in calibrated.items()},
        'output': {n: _db(about.get('error_after')) for n, about in calibrated.items()},
    }
    return [
        {'x': order[name], 'y': round(value, 2), 'name': name, 'series': series}
        for series, found in values.items()
        for name, value in found.items()
        if value is not None
    ]


def bits_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Bits of all operands in model order, for ``bits_chart``."""
    operands = report.get('operands')
    if operands is None:
        layers = report.get('stage2', {}).get('weights', {}).get('layers', {})
        operands = [
            {'name': n, 'module': n, 'kind': 'weight', 'bits': about['num_bits']}
            for n, about in layers.items()
        ]
    order = {name: i for i, name in enumerate(dict.fromkeys(o['module'] for o in operands))}
    return [
        {'x': order[o['module']], 'y': o['bits'], 'name': o['name'], 'series': o['kind']}
        for o in operands
    ]


def layer_table(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row for each layer: its name, bits and ratios in dB."""
    table: dict[str, dict[str, str]] = {}
    for row in sqnr_rows(report):
        table.setdefault(row['name'], {'name': row['name']})[row['series']] = f'{row["y"]:.1f}'
    for name, about in report.get('stage2', {}).get('weights', {}).get('layers', {}).items():
        table.setdefault(name, {'name': name})['bits'] = str(about['num_bits'])
    return list(table.values())


def _db(error: float | None) -> float | None:
    """An error relative to the signal's power as a ratio in dB."""
    return -10 * math.log10(error) if error and error > 0 else None
