# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""What we use of argparse's internals exists and gives what its help prints."""

from argparse import ArgumentParser

from gplq_mm.compat.argument_parser import actions_of, expanded_help, value_form


def test_arguments_are_described_as_in_the_help() -> None:
    parser = ArgumentParser(prog='x', add_help=False)
    parser.add_argument('--file', nargs='+', default='a', help='read (%(default)s)')
    (action,) = actions_of(parser)
    assert value_form(action) == 'FILE [FILE ...]' and expanded_help(action) == 'read (a)'
    assert '--file FILE [FILE ...]' in parser.format_help() and 'read (a)' in parser.format_help()
