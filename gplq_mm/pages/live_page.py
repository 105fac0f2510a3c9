# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The page of a run that goes on: refreshed now and then, never a reason to stop."""

import time
from pathlib import Path

from .vega import MissingPackagesError, require_packages

LEAST_SECONDS, LARGEST_SHARE = 60.0, 0.01
"""Time between two refreshes, and the largest share of the run's time that they may take."""


class LivePage:
    """Writes the page of one report; after a failure it stays as it is."""

    def __init__(self) -> None:
        self.next_time = 0.0
        self.is_off = False

    def refresh(self, report: Path, finished: bool = False) -> str:
        """Write the page if enough time has passed.

        Args:
            report: Path of the JSON report.
            finished: The run has ended: the page is written now, and no longer reloads itself.

        Returns:
            What is wrong, in one line and once; empty if nothing is.
        """
        start = time.monotonic()
        if self.is_off or (start < self.next_time and not finished):
            return ''
        try:
            require_packages()
            from .run_page import write_run_page

            write_run_page(report, running=not finished)
        except MissingPackagesError as error:
            self.is_off = True
            return str(error)
        except Exception as error:  # hours of training are worth more than its page
            self.is_off = True
            return f'the HTML report of {report} is not written: {error!r}'
        end = time.monotonic()
        self.next_time = end + max(LEAST_SECONDS, (end - start) / LARGEST_SHARE)
        return ''
