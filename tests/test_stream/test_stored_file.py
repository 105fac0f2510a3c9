# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gplq_mm.stream.stored_file import (
    read_stored,
    remove_unfinished,
    unfinished_file,
    write_stored,
)


@pytest.fixture(scope='module')
def ended() -> int:
    """Number of a process that has ended."""
    process = subprocess.Popen([sys.executable, '-c', ''])
    process.wait()
    return process.pid


def test_what_is_written_is_read(tmp_path: Path) -> None:
    content = {'a': torch.arange(3), 'b': [1, 'x']}
    write_stored(content, tmp_path / 'new' / 'a.pt')
    found = read_stored(tmp_path / 'new' / 'a.pt')
    assert torch.equal(found['a'], content['a'])
    assert found['b'] == content['b']
    assert [p.name for p in (tmp_path / 'new').iterdir()] == ['a.pt']
    assert read_stored(tmp_path / 'b.pt') is None


@pytest.mark.parametrize('kept', [0.0, 0.3, 0.9])
def test_a_damaged_file_is_named_and_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kept: float
) -> None:
    path = tmp_path / 'a.pt'
    write_stored(torch.arange(1000), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with caplog.at_level(logging.WARNING, 'gplq_mm'):
        assert read_stored(path) is None
    assert f'{path} is damaged and is computed again' in caplog.text
    assert not path.exists()


def test_an_error_leaves_the_former_file(tmp_path: Path) -> None:
    path = tmp_path / 'a.txt'
    path.write_text('former')
    with pytest.raises(OSError, match='full'), unfinished_file(path) as unfinished:
        unfinished.write_text('ne')
        raise OSError('the disk is full')
    assert [p.name for p in tmp_path.iterdir()] == ['a.txt']
    assert path.read_text() == 'former'


def test_files_of_killed_processes_are_removed(tmp_path: Path, ended: int) -> None:
    (tmp_path / 'units').mkdir()
    killed = [tmp_path / f'.a.pth.{ended}.tmp', tmp_path / 'units' / f'.u.pt.{ended}.tmp']
    kept = [tmp_path / f'.a.pth.{os.getpid()}.tmp', tmp_path / '.mine.tmp', tmp_path / 'a.pth']
    for path in (*killed, *kept):
        path.touch()
    assert remove_unfinished(tmp_path, older_than=3600) == []
    assert remove_unfinished(tmp_path) == sorted(killed)
    assert all(path.exists() for path in kept)
    assert remove_unfinished(tmp_path / 'nowhere') == []
