# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Floor 5: *when* things happen in a run."""

from .loops import ResumableEpochLoop
from .optim import GPLQOptimWrapperConstructor

__all__ = ['GPLQOptimWrapperConstructor', 'ResumableEpochLoop']
