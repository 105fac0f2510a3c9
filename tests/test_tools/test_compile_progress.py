# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from tools.dev import compile_progress
from tools.dev.compile_progress import CompileProgress, run_logged


def test_bar_shows_files_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 65.0, 90.0, 110.0])
    monkeypatch.setattr(time, 'monotonic', lambda: next(clock))
    progress = CompileProgress()
    assert progress.line('Building wheel') == '      1 min 05 s'
    log = '[1/77] c++ a.cpp\n'
    assert progress.line(log) == '      [--------------------] 1/77 files compiled'
    text = progress.line(f'{log}  [11/77] c++ b.cpp\n')
    assert text == '      [##------------------] 11/77 files compiled, 2 min 12 s left'


def test_progress_of_a_command_and_its_whole_output_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(compile_progress, 'LINE_SECONDS', 0.2)
    code = 'import time; print("[3/6] c++ a.cpp", flush=True); time.sleep(1)'
    run_logged([sys.executable, '-c', code], tmp_path / 'log', dict(os.environ))
    assert '[##########----------] 3/6 files compiled' in capsys.readouterr().out
    assert (tmp_path / 'log').read_text() == '[3/6] c++ a.cpp\n'


def test_failure_shows_the_end_of_the_output(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    code = 'import sys; print("the cause"); sys.exit(3)'
    with pytest.raises(SystemExit, match=r'^failed: .*\n.*log$'):
        run_logged([sys.executable, '-c', code], tmp_path / 'log', dict(os.environ))
    assert 'the cause' in capsys.readouterr().out
