# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""What the runtimes of exported files share: packages imported on demand, executed precision."""

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
    """

    operation: str
    kind: str
    precision: str


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
