# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Entry point of `python -m gplq_mm COMMAND`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from gplq_mm.version import __version__

COMMANDS = {
    'init': 'write a GPLQ config for a trained float model',
    'recipe': 'print a preset with a comment for each key, or a JSON schema of recipes',
    'report': 'write the HTML report of a run anew, or compare runs',
    'inspect': 'list every operation of a deployed model with its real precision',
    'doctor': 'list the installed libraries, conflicts, and the command that fixes each',
}


def build_parser(command: str) -> argparse.ArgumentParser:
    """Build the parser; only the chosen sub-command is imported.

    Args:
        command: First word of the command line; it may be no sub-command.
    """
    parser = argparse.ArgumentParser(prog='python -m gplq_mm')
    parser.add_argument('--version', action='version', version=__version__)
    commands = parser.add_subparsers(dest='command', metavar='COMMAND', required=True)
    for name, text in COMMANDS.items():
        sub_parser = commands.add_parser(name, help=text, description=text)
        if name == command:
            module = import_module(f'gplq_mm.cli.{name}')
            module.add_arguments(sub_parser)
            sub_parser.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command; an error of the user is reported in one line without a traceback.

    Args:
        argv: Command line without the program; `sys.argv[1:]` if None.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser(words[0] if words else '')
    args = parser.parse_args(words)
    try:
        return int(args.run(args))
    except (FileNotFoundError, ValueError) as error:
        parser.exit(2, f'error: {error}\n')


if __name__ == '__main__':
    sys.exit(main())
