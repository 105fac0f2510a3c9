# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""What the runtimes of exported files share: packages imported on demand, executed precision."""

import json
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

from ...compat.installed import is_installed


class Precision(NamedTuple):
    """One product of the graph that a runtime executes.

    Attributes:
        operation: Name of the model's operation, or of the node where it is none of them.
        kind: The runtime's operator: ``MatMulInteger``, ``FullyConnected``.
        precision: Types that are multiplied, ``uint8 x int8``, or the one type: ``int8``.
        outside: Why a float product is no operation of the recipe's scope, as the file says; empty
            if it is one, or if the file does not say it.
    """

    operation: str
    kind: str
    precision: str
    outside: str = ''


def precision_of(
    names: Iterable[str], kind: str, precision: str, outside: Mapping[str, str]
) -> Precision:
    """The row of a product.

    Args:
        names: Names that the executed node has or had, ``operation/MatMul``, the best one first.
        kind: See ``Precision``.
        precision: See ``Precision``.
        outside: Operation -> reason, of the file's metadata.

    Examples:
        >>> precision_of(['fused', 'neck/Conv'], 'Conv', 'float32', {'neck': 'outside the scope'})
        Precision(operation='neck', kind='Conv', precision='float32', outside='outside the scope')
    """
    names = list(names)
    if 'float' not in precision:
        return Precision(names[0].partition('/')[0], kind, precision)
    named = [name.partition('/')[0] for name in names if '/' in name] or names
    operation = next((name for name in named if name in outside), named[0])
    return Precision(operation, kind, precision, outside.get(operation, ''))


def outside_of(text: str) -> dict[str, str]:
    """Operation -> reason, of a file's metadata; empty for another content."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def require(packages: Iterable[str], purpose: str) -> None:
    """Refuse with one line if a package is missing.

    Args:
        packages: Import names, equal to the names that pip installs.
        purpose: What needs them, for the message: ``export to ONNX``.

    Raises:
        ModuleNotFoundError: If one is missing; names the pip command that installs all missing.
    """
    missing = [name for name in packages if not is_installed(name)]
    if missing:
        names = ' '.join(missing)
        raise ModuleNotFoundError(f'{purpose} needs {names}: pip install {names}')


def imported_on_demand(
    package: str, functions: Mapping[str, tuple[str, tuple[str, ...]]]
) -> Callable[[str], Any]:
    """``__getattr__`` of a package that imports a function at its first use.

    Args:
        package: Dotted name of the package.
        functions: Name -> file and packages that it needs.

    Returns:
        A function that raises ModuleNotFoundError with the pip command for a missing package, and
        AttributeError for another name.
    """

    def get(name: str) -> Any:
        if name not in functions:
            raise AttributeError(f'module {package!r} has no attribute {name!r}')
        file, packages = functions[name]
        require(packages, f'{package}.{name}')
        return getattr(import_module(file, package), name)

    return get
