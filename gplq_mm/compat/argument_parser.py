# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Undocumented parts of ``argparse`` with which documents list the arguments of tools."""

from argparse import Action, ArgumentParser, HelpFormatter


def actions_of(parser: ArgumentParser) -> list[Action]:
    """All arguments of a parser in their order."""
    return list(parser._actions)


def value_form(action: Action) -> str:
    """How the value of an option is written in its help, such as ``FILE [FILE ...]``."""
    return _formatter()._format_args(action, action.dest.upper())


def expanded_help(action: Action) -> str:
    """Help text with its ``%(default)s`` and the like filled in."""
    return _formatter()._expand_help(action)


def _formatter() -> HelpFormatter:
    return HelpFormatter(prog='', width=10_000)
