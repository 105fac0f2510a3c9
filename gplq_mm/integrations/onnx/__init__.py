# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""ONNX: export of finished models, and onnxruntime, imported when they are asked for.

``export(model, path, example)``, ``OnnxModel(path)``, ``compare(model, path, images)`` and
``precisions(path)``.
"""

from .packages import imported_on_demand

_FUNCTIONS = {
    'export': ('.onnx_export', ('onnx', 'onnxscript')),
    'compare': ('.equality', ('onnx', 'onnxruntime')),
    'precisions': ('.precision', ('onnx', 'onnxruntime')),
    'OnnxModel': ('.onnx_model', ('onnxruntime',)),
}
"""Name -> file and packages that it needs."""
__getattr__ = imported_on_demand(__name__, _FUNCTIONS)
