# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Weight ranges: one file per algorithm."""
