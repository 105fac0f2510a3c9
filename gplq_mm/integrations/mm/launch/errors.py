# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""How a tool ends: a user's mistake in one line, an interruption with the way to go on."""

import linecache
import sys
from collections.abc import Callable
from pathlib import Path

USER_ERROR = 2
PACKAGE = Path(__file__).resolve().parents[3]


class ConfigError(ValueError):
    """An error in the user's config, command line or files; the message is one line."""


def run_tool(main: Callable[[], None]) -> int:
    """Run a tool; a user's mistake ends in one line, anything else keeps its traceback.

    Args:
        main: The tool.

    Returns:
        The exit code: 0, or 2 for a user's mistake.
    """
    try:
        main()
    except Exception as error:
        line = describe(error)
        if line is None:
            raise
        sys.stderr.write(f'error: {line}\n')
        return USER_ERROR
    return 0


def describe(error: Exception) -> str | None:
    """One line for an error that the user can remove; None for any other error."""
    # these know MMEngine's data sets and checkpoints: imported when something failed
    from ....quantizers import UncalibratedError
    from .library_errors import explain_library_error
    from .tools import empty_data_set

    explained = explain_library_error(error) or empty_data_set(error)
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
