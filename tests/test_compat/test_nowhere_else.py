# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""No file outside `gplq_mm/compat/` touches an underscored name of another library."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ('gplq_mm', 'tools', 'examples')
MAY = ROOT / 'gplq_mm' / 'compat'
DOCUMENTED = {'_replace', '_asdict', '_fields', '_make'}  # of every named tuple
BY_NAME = {'getattr', 'setattr', 'hasattr', 'delattr'}
POLICY = (
    'Underscored names of other libraries change without notice: use them in gplq_mm/compat/ only, '
    'in the file of their library, with a test in tests/test_compat/ that names them.'
)


def is_private(name: str) -> bool:
    """One underscore in front; `__len__` is Python's."""
    return name.startswith('_') and not (name.startswith('__') and name.endswith('__'))


def defined(tree: ast.AST) -> Iterator[str]:
    """Names that a file gives: functions, classes, variables, and attributes of `self`."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Assign(targets=targets):
                yield from (name for target in targets for name in stored(target))
            case ast.AnnAssign(target=target):
                yield from stored(target)


def stored(target: ast.expr) -> Iterator[str]:
    """Names that an assignment gives; `other._x = 1` gives none, whose `_x` is another's."""
    match target:
        case ast.Name(id=name) | ast.Attribute(value=ast.Name(id='self'), attr=name):
            yield name
        case ast.Tuple(elts=parts):
            yield from (name for part in parts for name in stored(part))


def used(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Private names that a file asks an object or a module for, with the line."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name) if is_private(name):
                yield node.lineno, name
            case ast.Call(func=ast.Name(id=function), args=[_, ast.Constant(value=str(name)), *_]):
                if function in BY_NAME and is_private(name):
                    yield node.lineno, name
            case ast.ImportFrom(module=module, names=names):
                parts = [*(module or '').split('.'), *(alias.name for alias in names)]
                yield from ((node.lineno, name) for name in parts if is_private(name))
            case ast.Import(names=names):
                parts = [part for alias in names for part in alias.name.split('.')]
                yield from ((node.lineno, name) for name in parts if is_private(name))


def foreign(texts: dict[str, str]) -> list[str]:
    """Uses of private names that none of the files defines."""
    trees = {name: ast.parse(text) for name, text in texts.items()}
    own = DOCUMENTED.union(*map(defined, trees.values()))
    return [
        f'{name}, line {line}: {private}'
        for name, tree in trees.items()
        for line, private in used(tree)
        if private not in own
    ]


def overridden(texts: dict[str, str]) -> list[str]:
    """Private methods of torch's and MMEngine's modules that a class of ours replaces."""
    names = {'_load_from_state_dict', '_save_to_state_dict', '_apply', '_call_impl'}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    return [
        f'{name}, line {node.lineno}: {node.name}'
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name in names
    ]


def our_files() -> dict[str, str]:
    """Texts of the package, the tools and the examples, without `gplq_mm/compat/`."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob('*.py'))]
    parts = {path: path.relative_to(ROOT).parts for path in paths if MAY not in path.parents}
    return {
        '/'.join(names): path.read_text(encoding='utf-8')
        for path, names in parts.items()
        if not any(name.startswith('.') for name in names)
    }


def test_private_names_of_other_libraries_are_used_in_compat_only() -> None:
    found = foreign(our_files())
    assert not found, '\n'.join([POLICY, *found])


def test_private_methods_of_other_libraries_are_overridden_in_compat_only() -> None:
    found = overridden(our_files())
    assert not found, '\n'.join([POLICY, *found])


@pytest.mark.parametrize(
    ('text', 'count'),
    [
        ('runner._resume', 1),
        ('runner._resume = True', 1),
        ('runner._a, runner._b = 1, 2', 2),
        ("getattr(runner, '_train_loop', None)", 1),
        ('from torch.nn.modules.conv import _ConvNd', 1),
        ('from torch._dynamo import reset', 1),
        ('import torch._inductor.config', 1),
        ('self._iter', 1),
        ('self._epoch += 1', 1),
        ('self._mine = 1\nother._mine', 0),
        ('def _mine(): pass\nmodule._mine', 0),
        ('grid._replace(x=1)', 0),
        ("getattr(loader, '__len__')", 0),
        ('module.__class__ = Other', 0),
    ],
)
def test_foreign_tells_ours_from_others(text: str, count: int) -> None:
    assert len(foreign({'a.py': text})) == count


def test_overridden_finds_a_method() -> None:
    text = 'class A(nn.Module):\n    def _load_from_state_dict(self, *args): ...'
    assert overridden({'a.py': text}) == ['a.py, line 2: _load_from_state_dict']
