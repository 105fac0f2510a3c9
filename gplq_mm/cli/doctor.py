# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""`python -m gplq_mm doctor`: installed libraries, conflicts, and commands that fix them."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict

from gplq_mm.compat.installed import CLASHES, COMPONENTS, OK, Finding, inspect_component

OLDEST_PYTHON = (3, 10)
SHARED = ('python', 'torch', 'torchvision', 'numpy', 'mmengine', 'mmcv')
NEEDS = {
    'detection': (*SHARED, 'mmdet', 'pycocotools'),
    'classification': (*SHARED, 'mmpretrain'),
    'segmentation': (*SHARED, 'mmseg'),
}
COLUMNS = ('name', 'version', 'state', 'why')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `doctor`.

    Args:
        parser: Parser of this sub-command.
    """
    parser.add_argument('--json', action='store_true', help='print JSON instead of a table')


def run(args: argparse.Namespace) -> int:
    """Print the state of every component.

    Args:
        args: Parsed command line.

    Returns:
        0 if detection, classification and segmentation can run, else 1.
    """
    findings = [inspect_python(), *(inspect_component(part) for part in COMPONENTS)]
    runs = what_runs(findings)
    sys.stdout.write((as_json if args.json else as_table)(findings, runs) + '\n')
    return 0 if all(runs.values()) else 1


def inspect_python() -> Finding:
    """Report the interpreter."""
    version = platform.python_version()
    if sys.version_info >= OLDEST_PYTHON:
        return Finding('python', version, OK, sys.executable)
    oldest = '.'.join(map(str, OLDEST_PYTHON))
    fix = 'python3.11 -m venv .venv'
    return Finding('python', version, CLASHES, f'Python >= {oldest} is needed', fix)


def what_runs(findings: Sequence[Finding]) -> dict[str, bool]:
    """Which tasks can run: all components that they require are ok.

    Args:
        findings: One for each component.
    """
    ok = {finding.name for finding in findings if finding.state == OK}
    return {task: ok.issuperset(needs) for task, needs in NEEDS.items()}


def as_json(findings: Sequence[Finding], runs: dict[str, bool]) -> str:
    """Format the report as JSON: `runs` and `components`.

    Args:
        findings: One for each component.
        runs: Result of `what_runs`.
    """
    return json.dumps({'runs': runs, 'components': [asdict(f) for f in findings]}, indent=2)


def as_table(findings: Sequence[Finding], runs: dict[str, bool]) -> str:
    """Format the report as a table, followed by the commands that fix it.

    Args:
        findings: One for each component.
        runs: Result of `what_runs`.
    """
    rows = [COLUMNS, *(tuple(getattr(f, column) for column in COLUMNS) for f in findings)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS) - 1)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append('  '.join([*cells, row[-1]]).rstrip())
    lines += ['', *(f'{task}: {"can run" if can else "CANNOT RUN"}' for task, can in runs.items())]
    fixes = dict.fromkeys(f.mend for f in findings if f.mend)
    if fixes:
        lines += ['', 'to fix it:', *(f'  {fix}' for fix in fixes)]
    return '\n'.join(lines)
