# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Training that keeps packed integer codes of the operands for the backward pass."""

from . import attention, feed_forward, linear, matmul

__all__ = ['attention', 'feed_forward', 'linear', 'matmul']
