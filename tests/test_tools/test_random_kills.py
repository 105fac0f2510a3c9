# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The tool that kills runs: runs go on where they were killed, and a difference is found."""

import json
import time
from pathlib import Path

import pytest
import torch

from tools.dev.random_kills import FILES, STAGES, differences, kill_and_resume, whole_run

STEPS = 20


def count(work_dir: Path, resume: bool) -> int:
    """A run of twenty short steps; each adds a line to a file, at which a resume goes on."""
    work_dir.mkdir(exist_ok=True)
    lines = work_dir / 'lines.txt'
    done = len(lines.read_text().split()) if resume and lines.exists() else 0
    for step in range(done, STEPS):
        time.sleep(0.01)
        with lines.open('a') as file:
            file.write(f'{step}\n')
    return 0


def fail(work_dir: Path, resume: bool) -> int:
    return 3


def test_killed_runs_end_as_the_whole_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = whole_run(count, tmp_path / 'whole')
    assert seconds > STEPS * 0.01
    runs = list(kill_and_resume(count, tmp_path, kills=6, seconds=seconds, seed=0))
    expected = (tmp_path / 'whole' / 'lines.txt').read_text()
    assert all((run / 'lines.txt').read_text() == expected for run in runs)
    assert capsys.readouterr().out.count('kill ') == 6


def test_a_run_that_fails_ends_the_tool(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match='exit code 3'):
        whole_run(fail, tmp_path / 'whole')
    with pytest.raises(SystemExit, match='killed_0 ended with exit code 3'):
        list(kill_and_resume(fail, tmp_path, kills=1, seconds=60, seed=0))


def work_dir(folder: Path, weight: float = 1.0, score: float = 0.5) -> Path:
    """A finished run, as its files tell it."""
    folder.mkdir()
    for name in FILES:
        torch.save({'state_dict': {'w': torch.tensor([weight])}}, folder / name)
    report = {stage: {'metrics': {'top1': score}} for stage in STAGES}
    (folder / 'gplq_report.json').write_text(json.dumps(report))
    return folder


def test_differences_are_named(tmp_path: Path) -> None:
    whole = work_dir(tmp_path / 'whole')
    assert differences(whole, work_dir(tmp_path / 'same')) == []
    other = differences(whole, work_dir(tmp_path / 'other', weight=1.0000001))
    assert other == [f'{name}: w' for name in FILES]
    scored = differences(whole, work_dir(tmp_path / 'scored', score=0.6))
    assert scored == [f'gplq_report.json: {stage}.metrics' for stage in STAGES]
