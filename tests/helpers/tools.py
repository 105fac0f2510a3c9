# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The scripts in `tools/` as modules, so that tests call their functions."""

from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType

from .tiny_projects import our_tool


def load_tool(name: str) -> ModuleType:
    """Import `tools/<name>.py` under a name that hides no other module."""
    spec = spec_from_file_location(f'gplq_tool_{name}', our_tool(name))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
