# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""ONNX: export of finished models, and onnxruntime, imported when they are asked for.

``export(model, path, example)``, ``OnnxModel(path)``, ``compare(model, path, images)`` and
``precisions(path)``.
"""

from importlib import import_module
from typing import Any

from .packages import require

_FUNCTIONS = {
    'export': ('.onnx_export', ('onnx', 'onnxscript')),
    'compare': ('.equality', ('onnx', 'onnxruntime')),
    'precisions': ('.precision', ('onnx', 'onnxruntime')),
    'OnnxModel': ('.onnx_model', ('onnxruntime',)),
}
"""Name -> file and packages that it needs."""


def __getattr__(name: str) -> Any:
    """Functions of this folder; a missing package is named with the command that installs it."""
    if name not in _FUNCTIONS:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    file, packages = _FUNCTIONS[name]
    require(packages, f'gplq_mm.integrations.onnx.{name}')
    return getattr(import_module(file, __name__), name)
