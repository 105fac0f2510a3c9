# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Backends of the operations; each module or folder here registers itself on import."""

from importlib import import_module
from pkgutil import iter_modules

for _backend in iter_modules(__path__):
    import_module(f'{__name__}.{_backend.name}')
