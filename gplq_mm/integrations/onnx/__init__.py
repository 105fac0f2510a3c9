# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""ONNX: export of finished models, and onnxruntime, imported when they are asked for."""
