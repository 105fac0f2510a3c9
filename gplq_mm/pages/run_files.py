# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""What a run leaves in its work dir, as far as a page shows it."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..analysis.report import REPORT_NAME, read_json

SCALARS = 'vis_data/scalars.json'
"""MMEngine's local visualizer backend: a line of JSON for each logged iteration."""
_WARNING = re.compile(r'^[\d/: -]+mmengine - (WARNING|ERROR) - (.*)$', re.MULTILINE)
# Said by MMEngine to every run; they are about its own code.
_NOISE = ('"FileClient" will be deprecated', '"HardDiskBackend" is the alias')
MOST_WARNINGS = 20


@dataclass(frozen=True)
class RunFiles:
    """A run as its files tell it.

    Attributes:
        name: Name of the work dir.
        report: Content of the JSON report.
        scalars: Logged training iterations, in order.
        warnings: Distinct warnings and errors of its logs.
        examples: Content of the file of ``examples_path``; empty if there is none.
    """

    name: str
    report: dict[str, Any]
    scalars: list[dict[str, Any]]
    warnings: list[str]
    examples: dict[str, Any]


def page_path(report: Path) -> Path:
    """The page of a JSON report.

    Examples:
        >>> page_path(Path('x/gplq_report.json')).as_posix()
        'x/gplq_report.html'
    """
    return report.with_suffix('.html')


def examples_path(report: Path) -> Path:
    """The file beside a JSON report with pictures of the images that differ most.

    Examples:
        >>> examples_path(Path('x/gplq_report.json')).name
        'gplq_report_examples.json'
    """
    return report.with_name(f'{report.stem}_examples.json')


def find_report(place: Path) -> Path:
    """The JSON report that a user named.

    Args:
        place: A work dir, or a report such as ``gplq_final_mse_report.json``.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = place / REPORT_NAME if place.is_dir() else place
    if not path.is_file():
        raise FileNotFoundError(
            f'{place}: no {REPORT_NAME}; give the work dir of a GPLQ run, or its JSON report'
        )
    return path


def read_run(report: Path) -> RunFiles:
    """Read what a page shows of a run.

    Args:
        report: Path of the JSON report.

    Raises:
        ValueError: If it is no report of a run.
    """
    content = read_json(report)
    if not {'recipe', 'coverage'} <= set(content):
        raise ValueError(f'{report} is no report of a GPLQ run: it has no recipe and coverage')
    folder = report.parent
    return RunFiles(
        name=folder.resolve().name if report.name == REPORT_NAME else report.stem,
        report=content,
        scalars=[line for logs in log_folders(folder, content) for line in _scalars(logs)],
        warnings=list(dict.fromkeys(_warnings(folder, content)))[-MOST_WARNINGS:],
        examples=read_json(examples_path(report)),
    )


def log_folders(work_dir: Path, report: Mapping[str, Any]) -> list[Path]:
    """Log folders of a run's processes in order; of a report that does not tell them, all.

    Another run may have used the work dir before.
    """
    names = report.get('logs') or sorted(path.parent.name for path in work_dir.glob('*/*.log'))
    return [work_dir / name for name in dict.fromkeys(names)]


def _scalars(logs: Path) -> Iterator[dict[str, Any]]:
    """Training iterations of one process; a line that is being written is left out."""
    path = logs / SCALARS
    if not path.is_file():
        return
    for line in path.read_text(encoding='utf-8').splitlines():
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            continue
        if 'iter' in found or 'loss' in found:
            yield found


def _warnings(folder: Path, report: Mapping[str, Any]) -> Iterator[str]:
    paths = [path for logs in log_folders(folder, report) for path in sorted(logs.glob('*.log'))]
    for path in paths:
        text = path.read_text(encoding='utf-8', errors='replace')
        for level, message in _WARNING.findall(text):
            if not message.startswith(_NOISE):
                yield message if level == 'WARNING' else f'{level}: {message}'
