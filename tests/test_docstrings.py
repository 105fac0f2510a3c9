# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Public docstrings say which errors a function raises and which shapes its tensors have."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / 'gplq_mm'
SHAPE = re.compile(
    r'``\(|\(\w+(, \w+)+\)|\b(shapes?|scalar|any tensor|nested)\b|\b[Aa]s (in|for)\b', re.IGNORECASE
)
"""A shape, the word, or where the shapes are described."""
SEEN_ELSEWHERE = {'refusal', 'refusal_of_call', 'inputs_kept', 'map'}
"""Functions that get tensors but do not compute with them: they are described by their callers."""
INTERNAL = {'Reached', 'NotImplementedError', 'StopIteration'}
"""Exceptions that no caller outside the package sees."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def public(node: ast.AST) -> Iterator[Function]:
    """Public functions and methods below a node; functions inside functions are private."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef) and not child.name.startswith('_'):
            yield from public(child)
        elif isinstance(child, Function) and not child.name.startswith('_'):
            yield child


def raised(function: Function) -> set[str]:
    """Names of the exceptions in `raise` statements of a function."""
    found = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Raise) and node.exc is not None:
            error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            found.add(ast.unparse(error).split('.')[-1])
    return {name for name in found - INTERNAL if name[0].isupper()}


def tensors(function: Function) -> list[str]:
    """Arguments that are annotated as tensors or as lists of them."""
    arguments = [*function.args.args, *function.args.kwonlyargs]
    kinds = {a.arg: ast.unparse(a.annotation) for a in arguments if a.annotation is not None}
    return [
        name
        for name, kind in kinds.items()
        if re.search(r'\bTensor\b', kind) and not re.search('Mapping|dict|Callable', kind)
    ]


def problems(text: str) -> Iterator[str]:
    """What the public docstrings of a file leave out."""
    for function in public(ast.parse(text)):
        words = ast.get_docstring(function) or ''
        for name in sorted(raised(function)):
            if name not in words:
                yield f'line {function.lineno}: {function.name} does not say when it raises {name}'
        if tensors(function) and function.name not in SEEN_ELSEWHERE and not SHAPE.search(words):
            yield f'line {function.lineno}: {function.name} has no shape of {tensors(function)}'


def test_public_docstrings_name_errors_and_shapes() -> None:
    paths = [p for p in PACKAGE.rglob('*.py') if '.mim' not in p.parts]
    found = [
        f'{p.relative_to(PACKAGE)}, {x}' for p in paths for x in problems(p.read_text('utf-8'))
    ]
    assert not found, '\n'.join(['write ``(B, N, C)`` or a section Raises:', *found])


@pytest.mark.parametrize(
    ('words', 'line', 'number'),
    [
        ('Sum.', 'return x', 1),
        ('Sum of ``(N, C)``.', 'return x', 0),
        ('Sum, same shape.', "raise ValueError('x')", 1),
        ('Sum, same shape; ValueError if it is empty.', "raise ValueError('x')", 0),
    ],
)
def test_a_docstring_without_shape_or_error_is_found(words: str, line: str, number: int) -> None:
    text = f'def total(x: Tensor) -> Tensor:\n    """{words}"""\n    {line}\n'
    assert len(list(problems(text))) == number
    assert not list(problems(text.replace('total', '_total')))
