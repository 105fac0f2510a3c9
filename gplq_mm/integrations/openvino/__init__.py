# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""OpenVINO: export of finished models, and its CPU plugin, imported when they are asked for.

``export(model, path, example)``, ``OpenVinoModel(path)`` and ``precisions(path)``.
"""

from importlib import import_module
from typing import Any

from ..onnx.packages import require

_FUNCTIONS = {
    'export': ('.openvino_export', ('openvino', 'onnx', 'onnxscript')),
    'precisions': ('.openvino_model', ('openvino',)),
    'OpenVinoModel': ('.openvino_model', ('openvino',)),
}
"""Name -> file and packages that it needs."""


def __getattr__(name: str) -> Any:
    """Functions of this folder; a missing package is named with the command that installs it."""
    if name not in _FUNCTIONS:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    file, packages = _FUNCTIONS[name]
    require(packages, f'gplq_mm.integrations.openvino.{name}')
    return getattr(import_module(file, __name__), name)
