# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Predictions of FP32 and quantized model on the same validation images, kept for the report."""
