# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""How a tool ends: a user's mistake in one line, an interruption with the way to go on."""

import linecache
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

USER_ERROR, INTERRUPTED, TERMINATED = 2, 130, 143
PACKAGE = Path(__file__).resolve().parents[3]


class ConfigError(ValueError):
    """An error in the user's config, command line or files; the message is one line."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: a scheduler or another program stops the run."""


def run_tool(main: Callable[[], None], resume: str = '') -> int:
    """Run a tool; a user's mistake ends in one line, anything else keeps its traceback.

    Args:
        main: The tool.
        resume: Argument with which the tool goes on after an interruption.

    Returns:
        The exit code: 0, 2 for a user's mistake, 130 after Ctrl-C, 143 after SIGTERM.
    """
    try:
        with _sigterm_raised():
            main()
    except KeyboardInterrupt as stop:
        sys.stderr.write(f'{_how_to_go_on(stop, resume)}\n')
        return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED
    except Exception as error:
        line = describe(error)
        if line is None:
            raise
        sys.stderr.write(f'error: {line}\n')
        return USER_ERROR
    return 0


@contextmanager
def _sigterm_raised() -> Iterator[None]:
    """Context manager: SIGTERM raises ``Terminated``, so that open files are closed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    former = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def _how_to_go_on(stop: KeyboardInterrupt, resume: str) -> str:
    """One line: what stopped the tool, and the command that goes on."""
    cause = 'SIGTERM' if isinstance(stop, Terminated) else 'Ctrl-C'
    words = list(sys.argv)
    if resume and resume in words:
        at = words.index(resume)
        has_value = words[at + 1 : at + 2] and not words[at + 1].startswith('-')
        del words[at : at + (2 if has_value else 1)]
    command = shlex.join(['python', *words, *([resume] if resume else [])])
    return f'stopped by {cause}; {"go on" if resume else "start again"} with: {command}'


def describe(error: Exception) -> str | None:
    """One line for an error that the user can remove; None for any other error."""
    # these know MMEngine's data sets and checkpoints: imported when something failed
    from ....quantizers import UncalibratedError
    from ..data.data_errors import explain_data_error
    from .library_errors import explain_library_error

    explained = explain_data_error(error) or explain_library_error(error)
    mistakes = (ValueError, TypeError, FileNotFoundError, FileExistsError, ImportError)
    if explained is None and isinstance(error, (*mistakes, UncalibratedError)):
        explained = str(error) if is_refusal(error) else None
    return explained


def is_refusal(error: BaseException) -> bool:
    """Whether a ``raise`` statement of this package raised the error."""
    if isinstance(error, ConfigError):
        return True
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    filename = trace.tb_frame.f_code.co_filename
    line = linecache.getline(filename, trace.tb_lineno)
    return PACKAGE in Path(filename).resolve().parents and line.lstrip().startswith('raise ')
