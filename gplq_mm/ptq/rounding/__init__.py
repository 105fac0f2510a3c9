# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Rounding of weights: one file per algorithm, and their common parts."""
