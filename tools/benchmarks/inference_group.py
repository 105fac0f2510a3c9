# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Timing of all backends of one model in turns: one process each, only one of them at work."""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inference_backends import BACKENDS

WORKER = Path(__file__).with_name('inference_worker.py')
MOST_CALLS = 8
TURN_SECONDS = 0.5
"""A turn has so many calls that it takes about this long, `MOST_CALLS` at most."""
PAUSE = 0.02
"""Seconds between turns, in which spinning threads of the previous process go to sleep."""
EQUAL_TO = ('simulated', 'integer', 'our ONNX', 'our OpenVINO')


class WorkerError(RuntimeError):
    """A worker's error in one line."""


class WorkerProcess:
    """A running `inference_worker.py`; messages of its libraries go to a log file."""

    def __init__(self, folder: Path, backend: str, threads: int) -> None:
        self.backend = backend
        self.log = folder / f'{backend.replace(" ", "_")}_{threads}.log'
        command = [sys.executable, str(WORKER), str(folder), backend, str(threads)]
        environment = {**os.environ, 'OMP_NUM_THREADS': str(threads)}
        with self.log.open('w') as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            WorkerError: If it failed, or the process ended.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({'do': do, **request}) + '\n')
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ''
        if not line:
            code = self.process.wait()
            raise WorkerError(f'{do}: the process ended with code {code}, see {self.log}')
        answer: dict[str, Any] = json.loads(line)
        if 'error' in answer:
            raise WorkerError(f'{do}: {answer["error"]}')
        return answer

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@dataclass
class Measured:
    """What one backend gave with one number of threads.

    Attributes:
        seconds: Seconds of each call by batch size.
        peaks: Peak memory in bytes by batch size.
        file_bytes: Bytes of the deployed file by batch size.
        reason: Why there is no latency; empty if there is one.
        equal: Whether outputs equal the simulation's; None if they were not compared.
        metric: Name of the metric, None without real data.
        value: Its value.
    """

    seconds: dict[int, list[float]] = field(default_factory=dict)
    peaks: dict[int, int | None] = field(default_factory=dict)
    file_bytes: dict[int, int | None] = field(default_factory=dict)
    reason: str = ''
    equal: bool | None = None
    equal_images: int = 0
    metric: str | None = None
    value: float | None = None

    def median(self, batch: int) -> float | None:
        """Median of the calls, in seconds."""
        return statistics.median(self.seconds[batch]) if self.seconds.get(batch) else None

    def p95(self, batch: int) -> float | None:
        """95th percentile of the calls, in seconds."""
        found = sorted(self.seconds.get(batch, ()))
        return found[min(len(found) - 1, int(0.95 * len(found)))] if found else None


class Group:
    """All backends of one model with one number of threads.

    Args:
        folder: The model's files.
        about: Its `case.json`.
        backends: Names of the backends.
        threads: Threads of each process.
        progress: Called with a text for each step.
    """

    def __init__(
        self,
        folder: Path,
        about: dict[str, Any],
        backends: Sequence[str],
        threads: int,
        progress: Any = print,
    ) -> None:
        self.folder, self.about, self.threads, self.progress = folder, about, threads, progress
        self.measured = {name: Measured() for name in backends}
        self.workers: dict[str, WorkerProcess] = {}

    def run(self, rounds: int, check: bool, score: bool) -> dict[str, Measured]:
        """Open all backends, time them in turns, then compare and score them.

        Args:
            rounds: Turns of each backend and batch size.
            check: Whether to compare outputs with the simulation's.
            score: Whether to score on the test set of a user's config.
        """
        try:
            self._open()
            for batch in self.about['batches']:
                self._time(batch, rounds)
            if check:
                self._compare()
            if score:
                self._score()
        finally:
            for worker in self.workers.values():
                worker.close()
        return self.measured

    def _open(self) -> None:
        for name, measured in self.measured.items():
            reason = BACKENDS[name].unavailable(self.about['reasons'])
            if reason:
                measured.reason = reason
                continue
            self.progress(f'{name}: opening')
            worker = WorkerProcess(self.folder, name, self.threads)
            self.workers[name] = worker
            with self._noted(name):
                sizes = worker.ask('open')['file_bytes']
                measured.file_bytes = {int(batch): size for batch, size in sizes.items()}

    def _time(self, batch: int, rounds: int) -> None:
        calls: dict[str, int] = {}
        for name, worker in list(self.workers.items()):  # warm up; compilation happens here
            self.progress(f'batch {batch}: {name}: first calls')
            with self._noted(name):
                worker.ask('time', batch=batch, calls=1)
                taken = worker.ask('time', batch=batch, calls=1)['seconds'][0]
                calls[name] = max(1, min(MOST_CALLS, int(TURN_SECONDS / taken)))
                worker.ask('reset_peak')
        started = time.monotonic()
        for turn in range(rounds):
            for name in list(self.workers):
                time.sleep(PAUSE)
                with self._noted(name):
                    found = self.workers[name].ask('time', batch=batch, calls=calls[name])
                    self.measured[name].seconds.setdefault(batch, []).extend(found['seconds'])
            left = (time.monotonic() - started) / (turn + 1) * (rounds - turn - 1)
            self.progress(f'batch {batch}: round {turn + 1}/{rounds}, {left:.0f} s left')
        for name in list(self.workers):
            with self._noted(name):
                self.measured[name].peaks[batch] = self.workers[name].ask('peak')['bytes']

    def _compare(self) -> None:
        batch, reference = max(self.about['batches']), f'outputs_{self.threads}.pt'
        if 'simulated' not in self.workers:
            return
        for name in [name for name in EQUAL_TO if name in self.workers]:
            self.progress(f'{name}: outputs of {self.about["images"]} images')
            with self._noted(name):
                is_reference = name == 'simulated'
                found = self.workers[name].ask(
                    'equal', batch=batch, reference=reference, is_reference=is_reference
                )
                self.measured[name].equal = True if is_reference else found['equal']
                self.measured[name].equal_images = found['images']

    def _score(self) -> None:
        for name in list(self.workers):
            self.progress(f'{name}: scoring')
            with self._noted(name, keeps_latency=True):
                found = self.workers[name].ask('score')
                self.measured[name].metric = found['metric']
                self.measured[name].value = found['value']

    @contextlib.contextmanager
    def _noted(self, name: str, keeps_latency: bool = False) -> Iterator[None]:
        """A worker's error becomes its row's reason; without latency the worker is left out."""
        try:
            yield
        except WorkerError as error:
            self.measured[name].reason = str(error)
            self.progress(f'{name}: {error}')
            if not keeps_latency:
                self.workers.pop(name).close()
