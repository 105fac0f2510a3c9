# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Keep the memory of freed CPU tensors in the process: reusing it costs no page faults.

glibc returns each block above 32 MiB to the kernel as soon as a tensor is freed, and the next
tensor's pages are mapped and zeroed again. A training step frees and allocates the same blocks
repeatedly. Where page faults are slow, as on many virtual machines, they take much of its time.
"""

import ctypes
import os
import sys

import torch

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Options of glibc's ``mallopt``, from ``malloc.h``."""
USERS_CHOICE = ('MALLOC_TRIM_THRESHOLD_', 'MALLOC_MMAP_MAX_', 'MALLOC_MMAP_THRESHOLD_')
"""Environment variables that set the same options; they take precedence."""


def keep_freed_memory() -> bool:
    """Let this process and its forks keep freed memory.

    Does nothing if there is an accelerator, if the C library is not glibc, or if the
    environment has one of ``USERS_CHOICE``.

    Returns:
        Whether the options were set.
    """
    if torch.cuda.is_available() or not sys.platform.startswith('linux'):
        return False
    if any(name in os.environ for name in USERS_CHOICE):
        return False
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))
