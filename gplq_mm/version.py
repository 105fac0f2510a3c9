# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The version of the package; no other file states it."""

__version__ = '0.1.0'
