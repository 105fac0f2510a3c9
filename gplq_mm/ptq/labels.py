# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""``weight.ptq`` as one line of text, for command lines and tables."""

import ast
import re
from collections.abc import Mapping
from typing import Any


def parse_ptq(text: str) -> Any:
    """Value of ``weight.ptq`` for an algorithm given as text, or several joined by ``+``.

    The inverse of ``ptq_label``.

    Raises:
        ValueError: If the options are not ``key=value`` pairs of plain values.

    Examples:
        >>> parse_ptq('mse')
        'mse'
        >>> parse_ptq('repq+gptq(damping=0.1,act_order=False)')
        ['repq', {'type': 'gptq', 'damping': 0.1, 'act_order': False}]
    """
    entries = [_entry(part) for part in re.split(r'\+(?![^(]*\))', text)]
    if None in entries:
        raise ValueError(
            f'{text!r} is no algorithm; write NAME, NAME(option=value) or NAME+NAME, such as '
            "'repq+gptq(damping=0.1)'"
        )
    return entries[0] if len(entries) == 1 else entries


def _entry(text: str) -> Any:
    """A name, or a dict of name and options; None if the text is neither."""
    match = re.fullmatch(r'(\w+)(\(.*\))?', text)
    if match is None:
        return None
    name, options = match.groups()
    if options is None:
        return name
    try:
        call = ast.parse(f'dict{options}', mode='eval').body
        assert isinstance(call, ast.Call)
        found = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, TypeError):
        return None
    return None if call.args else {'type': name, **found}


def ptq_label(config: Any) -> str:
    """Name of an algorithm or a combination.

    Examples:
        >>> ptq_label('mse'), ptq_label(['repq', dict(type='gptq', damping=0.1)])
        ('mse', 'repq+gptq(damping=0.1)')
    """
    if isinstance(config, str):
        return config
    if isinstance(config, Mapping):
        options = ','.join(f'{k}={v!r}' for k, v in config.items() if k != 'type')
        return f'{config["type"]}({options})' if options else str(config['type'])
    return '+'.join(ptq_label(entry) for entry in config)
