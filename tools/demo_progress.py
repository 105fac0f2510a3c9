# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Commands of the demo: output to a log file, on the terminal a bar per phase and its time."""

import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TextIO

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

LAST_LINES = 20  # of a failed command


@dataclass(frozen=True)
class Part:
    """Lines of a log that tell how far a part of a phase has got.

    Attributes:
        pattern: Groups ``done`` and ``total``; ``epoch``, from 1, if there are several.
        share: Share of the phase's time.
        epochs: Number of epochs.
    """

    pattern: str
    share: float
    epochs: int = 1

    def fraction(self, line: str) -> float | None:
        """What is done after ``line``, 0 to 1; None for other lines."""
        found = re.search(self.pattern, line)
        if found is None:
            return None
        groups = found.groupdict()
        epoch = int(groups.get('epoch', 1))
        return (epoch - 1 + int(groups['done']) / int(groups['total'])) / self.epochs


@dataclass(frozen=True)
class Phase:
    """A phase of a command.

    Attributes:
        title: What the terminal shows.
        parts: Its parts, in their order.
        begins: Pattern of the line with which it begins; the first phase of a command needs none.
    """

    title: str
    parts: tuple[Part, ...] = ()
    begins: str = ''

    def fraction(self, line: str) -> float | None:
        """What is done of the whole phase after ``line``, 0 to 1; None for other lines."""
        before = 0.0
        for part in self.parts:
            done = part.fraction(line)
            if done is not None:
                return before + part.share * done
            before += part.share
        return None


def as_time(seconds: float) -> str:
    """Write a duration.

    Examples:
        >>> as_time(8.2), as_time(160)
        ('8 s', '2 min 40 s')
    """
    minutes, rest = divmod(round(seconds), 60)
    return f'{minutes} min {rest:02d} s' if minutes else f'{rest} s'


class TimeLeft(ProgressColumn):
    """Remaining time, if the rest goes on at the mean speed so far."""

    def render(self, task: Task) -> Text:
        """Write it as soon as something is done."""
        done, elapsed = task.percentage / 100, task.elapsed or 0.0
        return Text(f'{as_time(elapsed / done * (1 - done))} left' if done else '')


class Demo:
    """Numbers phases, and runs the commands that they belong to.

    Args:
        num_phases: Of all commands together.
        log: File that gets the output of all commands.
    """

    def __init__(self, num_phases: int, log: Path) -> None:
        self.num_phases = num_phases
        self.log = log
        self.number = 0
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text('', encoding='utf-8')

    def head(self, title: str) -> str:
        """Number and title of the current phase."""
        return f'[{self.number}/{self.num_phases}] {title} ...'

    def skip(self, title: str, reason: str) -> None:
        """Say that there is nothing to do in the next phase."""
        self.number += 1
        print(f'{self.head(title)} {reason}', flush=True)

    @contextmanager
    def phase(self, title: str) -> Iterator[Progress]:
        """Show a bar during the next phase, one line with its time afterwards."""
        self.number += 1
        begin = time.monotonic()
        columns = TextColumn('{task.description}'), BarColumn(), TimeLeft()
        with Progress(*columns, transient=True, disable=not sys.stdout.isatty()) as progress:
            progress.add_task(self.head(title).replace('[', r'\['), total=1.0)
            yield progress
        print(f'{self.head(title)} {as_time(time.monotonic() - begin)}', flush=True)

    def run(self, command: Sequence[str | Path], phases: Sequence[Phase]) -> None:
        """Run a Python command of one or more phases.

        Raises:
            SystemExit: If it fails; the message names phase, command and log file, after the last
                lines of its output.
        """
        words = [str(word) for word in command]
        text = shlex.join(['python', *words])
        with self.log.open('a', encoding='utf-8') as log:
            print(f'$ {text}', file=log, flush=True)
            process = subprocess.Popen(
                [sys.executable, *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors='replace',
            )
            assert process.stdout is not None
            lines = _logged(process.stdout, log)
            pending = next(lines, None)
            for phase, following in zip(phases, [*phases[1:], None], strict=True):
                with self.phase(phase.title) as progress:
                    while pending is not None and not begins(following, pending):
                        done = phase.fraction(pending)
                        if done is not None:
                            progress.update(progress.task_ids[0], completed=done)
                        pending = next(lines, None)
                    if pending is None and process.wait():
                        self._fail(text, process.returncode)

    def _fail(self, command: str, code: int) -> NoReturn:
        tail = self.log.read_text(encoding='utf-8').splitlines()[-LAST_LINES:]
        print('\n'.join(tail), flush=True)
        sys.exit(
            f'demo: step {self.number}/{self.num_phases} failed with exit code {code}: '
            f'{command}\nthe whole output: {self.log}'
        )


def _logged(lines: Iterable[str], log: TextIO) -> Iterator[str]:
    """Write each line to the log and pass it on."""
    for line in lines:
        log.write(line)
        log.flush()
        yield line


def begins(phase: Phase | None, line: str) -> bool:
    """Whether a phase begins with a line."""
    return phase is not None and re.search(phase.begins, line) is not None
