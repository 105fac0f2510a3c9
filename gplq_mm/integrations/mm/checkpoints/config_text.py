# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Read the config text that MMEngine stores in checkpoints, without running it."""

import ast
from typing import Any


def parse_config_text(text: str) -> dict[str, Any]:
    r"""Values of a config as ``Config.pretty_text`` writes it: names bound to plain data.

    MMEngine's own ``Config.fromstring`` runs the text, and a checkpoint may come from anywhere.

    Args:
        text: Lines such as ``model = dict(type='ImageClassifier', head=dict(num_classes=10))``.

    Returns:
        Each name with its value: dicts, lists, tuples, strings, numbers, None.

    Raises:
        ValueError: If the text is not Python, or has anything but plain data; the message names it.

    Examples:
        >>> parse_config_text('lr = -0.1\nmodel = dict(neck=None, scales=[(1, 2)])')
        {'lr': -0.1, 'model': {'neck': None, 'scales': [(1, 2)]}}
    """
    try:
        statements = ast.parse(text).body
    except SyntaxError as error:
        raise ValueError(f'the config text is no Python: {error}') from error
    values = {}
    for statement in statements:
        if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
            raise ValueError(f'the config text has more than plain values: {_source(statement)}')
        values[statement.targets[0].id] = _value(statement.value)
    return values


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict':
        positional = [_value(argument) for argument in node.args]
        keywords = {str(item.arg): _value(item.value) for item in node.keywords}
        return dict(*positional, **keywords)
    if isinstance(node, ast.List):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_value(item) for item in node.elts)
    if isinstance(node, ast.Dict) and None not in node.keys:
        return {_value(k): _value(v) for k, v in zip(node.keys, node.values, strict=True) if k}
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(f'the config text has more than plain values: {_source(node)}') from None


def _source(node: ast.AST) -> str:
    return ast.unparse(node)[:80]
