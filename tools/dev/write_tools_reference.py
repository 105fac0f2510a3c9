# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Write the pages of the tools' arguments from their parsers.

Example:
    python tools/dev/write_tools_reference.py
"""

from __future__ import annotations

import runpy
import sys
from argparse import SUPPRESS, Action, ArgumentParser
from pathlib import Path
from unittest.mock import patch

from gplq_mm.__main__ import COMMANDS, build_parser
from gplq_mm.compat.argument_parser import actions_of, expanded_help, value_form
from gplq_mm.integrations.mm.launch.tools import add_arguments

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / 'docs' / 'reference'
TOOLS = (
    'train',
    'test',
    'ptq',
    'sensitivity',
    'transfer',
    'deploy',
    'demo',
    'model_converters/swin_to_gplq',
    'model_converters/timm_to_mmpretrain',
    'model_converters/vitdet_to_gplq',
    'zoo/make_row',
)
"""Tools for users, in the order of the page, as paths below `tools/`."""
BENCHMARKS = ('benchmarks/accuracy', 'benchmarks/inference', 'benchmarks/stage1')
HEADER = """\
# Tools and commands

Written by `tools/dev/write_tools_reference.py` from the parsers; a test compares them. Of an
installed package the tools are in `gplq_mm/.mim/tools`; `mim train`, `mim test` and the tools of
your own project take a GPLQ config too. Exit code 2 is a mistake in the input, told in one line.
The benchmarks have [a page of their own](benchmark_tools.md).
"""
BENCHMARKS_HEADER = """\
# Benchmark tools

Written by `tools/dev/write_tools_reference.py` from the parsers; a test compares them. What they
measured: [accuracy](../accuracy.md), [speed of deployed models](../deployment_speed.md), [memory
and speed of training](../stage1_engine.md).
"""


class Parsed(Exception):  # noqa: N818  carries a parser out of the function that builds it
    """Raised in place of parsing.

    Args:
        parser: The parser that was built.
    """

    def __init__(self, parser: ArgumentParser) -> None:
        super().__init__(parser.prog)
        self.parser = parser


def parser_of(tool: str) -> ArgumentParser:
    """The parser that a tool builds.

    Args:
        tool: Path below `tools/`, without suffix.
    """
    path = ROOT / 'tools' / f'{tool}.py'
    with (
        patch.object(ArgumentParser, 'parse_args', _carry_out),
        patch.object(sys, 'argv', [tool]),
        patch.object(sys, 'path', [str(path.parent), *sys.path]),
    ):
        try:
            runpy.run_path(str(path), run_name='__main__')
        except Parsed as built:
            return built.parser
    raise AssertionError(f'{path} parses no arguments')


def _carry_out(parser: ArgumentParser, *_: object) -> None:
    raise Parsed(parser)


def arguments(parser: ArgumentParser) -> list[Action]:
    """Arguments of a parser for users: not those of launchers, not `--help`."""
    hidden = {'--help', '--local-rank'}
    return [action for action in actions_of(parser) if not hidden & {*action.option_strings}]


def row(action: Action) -> str:
    """One argument as a line of a table."""
    shown = ', '.join(action.option_strings) or str(action.metavar or action.dest)
    if action.option_strings and action.nargs != 0:
        shown = f'{action.option_strings[-1]} {value_form(action)}'
        if action.choices and action.nargs == '+':  # argparse writes the choices twice
            shown = f'{shown.split(" [")[0]} ...'
    text = expanded_help(action) if action.help not in (None, SUPPRESS) else ''
    if action.required and action.option_strings:
        text += ' (required)'
    if action.default not in (None, False, SUPPRESS, [None]) and 'default' not in text:
        text += f' (default: {_relative(action.default)})'
    return f'| `{_cell(shown)}` | {_cell(text.strip())} |'


def _relative(default: object) -> object:
    is_ours = isinstance(default, Path) and default.is_relative_to(ROOT)
    return default.relative_to(ROOT) if is_ours else default


def _cell(text: str) -> str:
    return ' '.join(text.split()).replace('|', '\\|')


def section(title: str, about: str, actions: list[Action]) -> str:
    """A heading, a sentence and the table of the arguments."""
    lines = [f'## {title}', '', _sentence(about), '']
    if actions:
        lines += ['| argument | meaning |', '| --- | --- |', *map(row, actions), '']
    return '\n'.join(lines)


def _sentence(text: str) -> str:
    text = ' '.join(text.split())
    text = text[:1].upper() + text[1:]
    return text if text.endswith('.') else f'{text}.'


def render() -> dict[str, str]:
    """The pages by file name."""
    common = ArgumentParser()
    add_arguments(common)
    about = 'Arguments of `train.py`, `test.py`, `ptq.py`, `sensitivity.py` and `transfer.py`'
    parts = [HEADER, section('Common arguments', about, arguments(common))]
    for name, text in COMMANDS.items():
        parts.append(section(f'python -m gplq_mm {name}', text, arguments(command_parser(name))))
    parts += [tool_section(tool, common) for tool in TOOLS]
    benchmarks = [BENCHMARKS_HEADER, *(tool_section(tool, common) for tool in BENCHMARKS)]
    return {'tools.md': '\n'.join(parts), 'benchmark_tools.md': '\n'.join(benchmarks)}


def command_parser(name: str) -> ArgumentParser:
    """The parser of `python -m gplq_mm NAME`."""
    commands = next(a for a in actions_of(build_parser(name)) if a.dest == 'command')
    assert isinstance(commands.choices, dict)
    return commands.choices[name]


def tool_section(tool: str, common: ArgumentParser) -> str:
    """Arguments of one tool, those that are common left out."""
    parser = parser_of(tool)
    shared = {action.dest: action.help for action in arguments(common)}
    own = arguments(parser)
    about = (parser.description or '').split('\n\n')[0]
    if shared.keys() <= {action.dest for action in own}:
        own = [action for action in own if shared.get(action.dest) != action.help]
        about = f'{_sentence(about)} With the [common arguments](#common-arguments)'
    return section(f'tools/{tool}.py', about, own)


if __name__ == '__main__':
    for file_name, text in render().items():
        (FOLDER / file_name).write_text(text, encoding='utf-8')
