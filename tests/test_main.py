# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
from __future__ import annotations

import argparse
import sys
from types import ModuleType

import pytest

import gplq_mm
from gplq_mm.__main__ import COMMANDS, build_parser, main


def make_command(run) -> ModuleType:
    """A sub-command with one option."""
    module = ModuleType('gplq_mm.cli.doctor')
    module.add_arguments = lambda parser: parser.add_argument('--n', type=int, default=1)
    module.run = run
    return module


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch):
    """Put a sub-command of the test's choice in place of `doctor`."""

    def replace(run) -> None:
        monkeypatch.setitem(sys.modules, 'gplq_mm.cli.doctor', make_command(run))

    return replace


def test_returns_the_exit_code_of_the_command(doctor) -> None:
    doctor(lambda args: args.n)
    assert main(['doctor']) == 1
    assert main(['doctor', '--n', '3']) == 3


@pytest.mark.parametrize('error', [ValueError('bits: 9'), FileNotFoundError('no a.pth')])
def test_mistake_of_the_user_is_one_line(doctor, capsys, error: Exception) -> None:
    def run(args: argparse.Namespace) -> int:
        raise error

    doctor(run)
    with pytest.raises(SystemExit) as stop:
        main(['doctor'])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f'error: {error}\n'


def test_mistake_of_ours_keeps_its_traceback(doctor) -> None:
    def run(args: argparse.Namespace) -> int:
        raise AssertionError('ours')

    doctor(run)
    with pytest.raises(AssertionError, match='ours'):
        main(['doctor'])


def test_help_lists_commands_without_importing_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in COMMANDS:
        monkeypatch.setitem(sys.modules, f'gplq_mm.cli.{name}', None)
    text = build_parser('--help').format_help()
    assert all(name in text for name in COMMANDS)


def test_version(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(['--version'])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == gplq_mm.__version__
