# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Attention with both matrix products quantized: dot-product, multi-head, window, relative."""
