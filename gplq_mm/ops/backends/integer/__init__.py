# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Inference on 8-bit and 16-bit integers, by kernels compiled from C for this processor.

The output equals that of ``backends/exact.py`` bit for bit: the integer sums are the same, and
rescaling and bias keep the order of their operations. Weights are arranged once and kept until
they or a scale change.
"""

from . import attention, conv, linear, matmul

__all__ = ['attention', 'conv', 'linear', 'matmul']
