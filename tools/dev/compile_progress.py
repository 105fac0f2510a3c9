# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Run a command with its output in a log file; show time, compiled files and the time left."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

COMPILED_FILES = re.compile(r'^\s*\[(\d+)/(\d+)\]', re.MULTILINE)  # as ninja counts them
LINE_SECONDS = 30  # between two lines if there is no terminal
WIDTH = 79


def say(text: str) -> None:
    """Print at once, also into a pipe."""
    print(text, flush=True)


def as_time(seconds: float) -> str:
    """Write a duration.

    Examples:
        >>> as_time(125)
        '2 min 05 s'
    """
    return f'{int(seconds) // 60} min {int(seconds) % 60:02d} s'


class CompileProgress:
    """Reads from the output of a build how many files are compiled."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.first: tuple[int, float] | None = None  # files, and when they were seen

    def line(self, log: str) -> str:
        """Write the elapsed time; once files are compiled, a bar and the time left."""
        now, found = time.monotonic(), COMPILED_FILES.findall(log)
        if not found:
            return f'      {as_time(now - self.start)}'
        done, total = (int(number) for number in found[-1])
        self.first = self.first or (done, now)
        since, left = done - self.first[0], ''
        if since:  # not counted from the start: what comes before the first file is another pace
            left = f', {as_time((now - self.first[1]) / since * (total - done))} left'
        return f'      [{"#" * (20 * done // total):-<20}] {done}/{total} files compiled{left}'


def run_logged(command: list[str], log: Path, environ: dict[str, str]) -> None:
    """Run a command; on a terminal its progress is one line that changes.

    Args:
        command: Program and arguments.
        log: File that gets its output.
        environ: Its environment variables.

    Raises:
        SystemExit: It failed; the end of its output has been shown.
    """
    with log.open('w', encoding='utf-8') as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environ)
    is_terminal = sys.stdout.isatty()
    progress = CompileProgress()
    while process.poll() is None:
        try:
            process.wait(1 if is_terminal else LINE_SECONDS)
        except subprocess.TimeoutExpired:
            text = progress.line(log.read_text(encoding='utf-8', errors='replace'))
            print(end=f'\r{text:<{WIDTH}}' if is_terminal else f'{text}\n', flush=True)
    if is_terminal:
        print(end=f'\r{"":<{WIDTH}}\r', flush=True)
    if process.returncode:
        text = log.read_text(encoding='utf-8', errors='replace')
        say('\n'.join(text.splitlines()[-30:]))
        sys.exit(f'failed: {shlex.join(command)}\nthe whole output: {log}')
