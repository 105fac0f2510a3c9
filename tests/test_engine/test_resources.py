# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The meter of a stage."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from gplq_mm.engine.resources import StageMeter, peak_rss_bytes

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
    with StageMeter() as big:
        block = np.ones(96 * MIB, np.uint8)
        del block
    with StageMeter() as small:
        pass
    assert big.peak_memory_bytes > small.peak_memory_bytes + 64 * MIB
    assert before > MIB
