# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Types of callbacks: a pass over the images, and a progress report."""

from collections.abc import Callable

RunPass = Callable[[], None]
"""Runs the model once over this rank's share of the calibration images."""

Progress = Callable[[str, int, int], None]
"""Called as ``progress(name, index, total)`` before each layer or block, index from 0."""
