# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The meter of a stage."""

import mmap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from gplq_mm.integrations.mm.run.resources import StageMeter, peak_rss_bytes

MIB = 2**20


def test_seconds_are_wall_time() -> None:
    with StageMeter() as meter:
        time.sleep(0.05)
    assert 0.05 <= meter.seconds < 5


def test_the_time_of_a_failed_stage_is_known_too() -> None:
    meter = StageMeter()
    with pytest.raises(KeyError), meter:
        raise KeyError
    assert meter.seconds > 0
    assert meter.peak_memory_bytes > 0


@pytest.mark.skipif(
    torch.cuda.is_available() or not Path('/proc/self/clear_refs').exists(),
    reason='counts resident memory on Linux',
)
def test_the_peak_is_of_this_stage_and_outlives_what_was_freed() -> None:
    before = peak_rss_bytes()
    # pages of its own: after many tests the heap may have as much in hand, resident
    with StageMeter() as big, mmap.mmap(-1, 96 * MIB) as block:
        np.frombuffer(block, np.uint8)[:] = 1
    with StageMeter() as small:
        pass
    assert big.peak_memory_bytes > small.peak_memory_bytes + 64 * MIB
    assert before > MIB


def test_a_peak_outlives_a_reset_by_the_logger(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = {'bytes': 0}
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'max_memory_allocated', lambda: peak['bytes'])
    monkeypatch.setattr(torch.cuda, 'reset_peak_memory_stats', lambda: peak.update(bytes=0))
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with StageMeter() as meter:
        meter.sample_after(optimizer.register_step_post_hook)
        meter.sample_after(layer.register_forward_hook)
        layer(torch.ones(2)).sum().backward()
        peak['bytes'] = 7 * MIB
        optimizer.step()
        torch.cuda.reset_peak_memory_stats()
        layer(torch.ones(2))
        peak['bytes'] = 3 * MIB
    assert meter.peak_memory_bytes == 7 * MIB
    peak['bytes'] = 9 * MIB
    optimizer.step()
    layer(torch.ones(2))
    assert meter.peak_memory_bytes == 7 * MIB  # the stage has ended
