# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Training loops."""

from .resumable_loop import ResumableEpochLoop

__all__ = ['ResumableEpochLoop']
