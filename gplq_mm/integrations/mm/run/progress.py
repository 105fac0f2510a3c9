# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Progress of long work in the log, part by part, with the remaining time."""

import time

from mmengine.dist import is_main_process
from mmengine.logging import print_log

LINES = 6
"""Approximate number of logged lines."""


class ProgressLog:
    """Called before each part; logs some of the parts and the remaining time.

    Args:
        title: Name of the work.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.start = time.monotonic()

    def __call__(self, name: str, index: int, total: int) -> None:
        """Record that a part begins.

        Args:
            name: Name of the part.
            index: Its number, from 0.
            total: Number of parts.
        """
        if index == 0:
            self.start = time.monotonic()
        if not is_main_process() or (index + 1 != total and index % max(total // LINES, 1)):
            return
        seconds = time.monotonic() - self.start
        left = f', {seconds / index * (total - index):.0f} s left' if index else ''
        print_log(f'{self.title}: {index + 1}/{total} {name}{left}', logger='current')
