# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Packages that deployment needs, imported only when it is asked for."""

from collections.abc import Iterable

from ...compat.installed import is_installed


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
