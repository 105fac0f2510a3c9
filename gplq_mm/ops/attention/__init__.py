# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Attention: both matrix products quantized, in the forms that models write it."""
