# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""What procedures over images are given by their caller: a pass, and somebody to tell."""

from collections.abc import Callable

RunPass = Callable[[], None]
"""Runs the model once over this rank's share of the calibration images."""

Progress = Callable[[str, int, int], None]
"""Called as ``progress(name, index, total)`` before each layer or block, index from 0."""
