# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Floor 5: *when* things happen in a run."""

from .amp import CpuAmpOptimWrapper
from .loops import ResumableEpochLoop
from .optim import GPLQOptimWrapperConstructor

__all__ = ['CpuAmpOptimWrapper', 'GPLQOptimWrapperConstructor', 'ResumableEpochLoop']
