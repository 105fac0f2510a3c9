# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Time and peak memory of one stage."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
from torch.utils.hooks import RemovableHandle


class StageMeter:
    """Context manager that measures seconds and peak memory in bytes.

    Peak memory is ``torch.cuda.max_memory_allocated`` on CUDA, else the process's
    peak resident set within the stage (Linux resets it; elsewhere it is the peak
    since the process began). MMEngine's logger resets CUDA's counter with every line that
    it writes; ``sample_after`` reads the counter before that.

    Attributes:
        seconds: Wall time between entry and exit.
        peak_memory_bytes: Peak memory between entry and exit.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.peak_memory_bytes = 0
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> 'StageMeter':
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            _reset_peak_rss()
        self._start = time.perf_counter()
        return self

    def elapsed(self) -> float:
        """Seconds since the entry."""
        return time.perf_counter() - self._start

    def sample_after(self, register: Callable[[Callable[..., None]], RemovableHandle]) -> None:
        """Read CUDA's peak after every call of a hook, until the stage ends.

        Args:
            register: Registers a hook, such as a module's ``register_forward_hook`` or an
                optimizer's ``register_step_post_hook``.
        """
        if torch.cuda.is_available():
            self._handles.append(register(lambda *_: self._sample()))

    def _sample(self) -> None:
        peak = torch.cuda.max_memory_allocated()
        self.peak_memory_bytes = max(self.peak_memory_bytes, peak)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.seconds = time.perf_counter() - self._start
        for handle in self._handles:
            handle.remove()
        if torch.cuda.is_available():
            self._sample()
        else:
            self.peak_memory_bytes = peak_rss_bytes()


def peak_rss_bytes() -> int:
    """Peak resident set size of this process, bytes."""
    status = Path('/proc/self/status')
    if status.is_file():
        found = re.search(r'VmHWM:\s+(\d+) kB', status.read_text())
        if found:
            return int(found.group(1)) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _reset_peak_rss() -> None:
    try:
        Path('/proc/self/clear_refs').write_text('5')
    except OSError:
        return  # not Linux, or not permitted: the peak is then the process's
