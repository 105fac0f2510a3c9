# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Ctrl-C and SIGTERM in stage 1: the iteration ends, its state is saved, then the run stops."""

import signal
import threading
from types import FrameType
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import IterBasedTrainLoop, Runner

from ..checkpoints.run_checkpoint import write_resumable
from ..resumable_loop import ResumableEpochLoop

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class SaveOnSignal(Hook):
    """Saves the state of a training that is told to stop, at the end of its iteration.

    A second signal stops at once. Loops that cannot resume in the middle of an epoch
    stop at once too. Outside training iterations signals do what they did before.
    """

    priority = 'VERY_LOW'  # with the checkpoint hook: schedulers have made their step

    def __init__(self) -> None:
        self.received: int | None = None
        self._former: dict[int, Any] = {}

    def before_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        """Note signals from here on."""
        resumes = isinstance(runner.train_loop, ResumableEpochLoop | IterBasedTrainLoop)
        in_main = threading.current_thread() is threading.main_thread()
        if resumes and in_main and not self._former:
            self._former = {number: signal.signal(number, self._note) for number in SIGNALS}

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        """Save and stop if a signal came."""
        if self.received is None:
            return
        done = runner.iter + 1
        if is_main_process():  # other ranks may be dead: nothing here waits for them
            path = write_resumable(runner, f'iter_{done}.pth', done)
            print_log(f'stopped after iteration {done}; saved {path}', logger='current')
        number = self.received
        self._restore()
        signal.raise_signal(number)

    def before_val_epoch(self, runner: Runner) -> None:
        """A validation is not waited for."""
        self._stop_noting()

    def after_train_epoch(self, runner: Runner) -> None:
        """Signals do what they did before."""
        self._stop_noting()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:  # the second one
            self._restore()
            signal.raise_signal(number)
        self.received = number

    def _stop_noting(self) -> None:
        """Restore the handlers, and give them a signal that came after the last iteration."""
        number = self.received
        self._restore()
        if number is not None:
            signal.raise_signal(number)

    def _restore(self) -> None:
        self.received = None
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}
