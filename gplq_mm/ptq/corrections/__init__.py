# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Corrections after rounding: biases, normalizations, linear side branches."""
