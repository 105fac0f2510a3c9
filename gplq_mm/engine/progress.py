# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Progress of long work that goes part by part, in the log, with the time that is left."""

import time

from mmengine.dist import is_main_process
from mmengine.logging import print_log

LINES = 6
"""About so many lines are logged."""


class ProgressLog:
    """Called before each part; logs some of them and how long the rest will take.

    Args:
        title: What is being done.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.start = time.monotonic()

    def __call__(self, name: str, index: int, total: int) -> None:
        """Note that a part begins.

        Args:
            name: Of the part.
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
