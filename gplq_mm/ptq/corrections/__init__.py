# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Corrections of what rounding changed: biases, norms, linear side branches."""
