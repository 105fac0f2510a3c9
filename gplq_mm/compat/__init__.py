# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Checks of installed libraries, and uses of their internals: one file per library."""

from .installed import check_versions, is_installed

__all__ = ['check_versions', 'is_installed']
