# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""OpenVINO: export of finished models, and its CPU plugin, imported when they are asked for.

``export(model, path, example)``, ``OpenVinoModel(path)`` and ``precisions(path)``.
"""

from ..onnx.packages import imported_on_demand

_FUNCTIONS = {
    'export': ('.openvino_export', ('openvino', 'onnx', 'onnxscript')),
    'precisions': ('.openvino_model', ('openvino',)),
    'OpenVinoModel': ('.openvino_model', ('openvino',)),
}
"""Name -> file and packages that it needs."""
__getattr__ = imported_on_demand(__name__, _FUNCTIONS)
