# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Two runs do not write to one work dir; a killed one leaves no lock."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gplq_mm.integrations.mm.launch.errors import ConfigError
from gplq_mm.integrations.mm.launch.work_dir_lock import LOCK_NAME, lock_work_dir
from tests.helpers.runners import gplq_config, make_runner
from tests.helpers.tiny_projects import TinyProject

HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], 'w')
fcntl.lockf(file, fcntl.LOCK_EX)
file.write('process 17 on there')
file.flush()
print('locked', flush=True)
time.sleep(600)
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Another process that holds the lock of `tmp_path`."""
    command = [sys.executable, '-c', HOLD, str(tmp_path / LOCK_NAME)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == 'locked\n'
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_until_the_first_is_gone(
    other: subprocess.Popen, tmp_path: Path
) -> None:
    says = f'{tmp_path} is in use: process 17 on there is running in it; .* another --work-dir'
    with pytest.raises(ConfigError, match=says):
        lock_work_dir(tmp_path)
    other.kill()
    other.wait()
    file = lock_work_dir(tmp_path)
    assert file is not None
    assert (tmp_path / LOCK_NAME).read_text().startswith('process ')
    file.close()


def test_a_training_is_refused_before_it_writes(
    other: subprocess.Popen, project: TinyProject, fp32: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match='is in use'):
        make_runner(gplq_config(project, fp32, tmp_path)).train()
    assert not list(tmp_path.glob('gplq_*'))


def test_one_process_may_run_again_in_its_own_work_dir(tmp_path: Path) -> None:
    first, second = lock_work_dir(tmp_path), lock_work_dir(tmp_path)
    assert first is not None and second is not None
