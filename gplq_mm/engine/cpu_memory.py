# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Memory that CPU tensors free stays with the process, to be used again without page faults.

glibc returns each block above 32 MiB to the kernel as soon as a tensor is freed, and the next
tensor's pages are mapped and zeroed anew. A training step frees and takes the same blocks over and
over; where page faults are dear, as on many virtual machines, they take a good part of its time.
"""

import ctypes
import os
import sys

import torch

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Options of glibc's ``mallopt``, from ``malloc.h``."""
USERS_CHOICE = ('MALLOC_TRIM_THRESHOLD_', 'MALLOC_MMAP_MAX_', 'MALLOC_MMAP_THRESHOLD_')
"""Environment variables by which glibc is told otherwise; they win."""


def keep_freed_memory() -> bool:
    """Let this process, and those that it forks, keep freed memory.

    Does nothing where an accelerator does the work, where the C library is not glibc, and where
    the environment holds one of ``USERS_CHOICE``.

    Returns:
        Whether it was done.
    """
    if torch.cuda.is_available() or not sys.platform.startswith('linux'):
        return False
    if any(name in os.environ for name in USERS_CHOICE):
        return False
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))
