# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The checkpoint that a killed run goes on from, whatever the kill left behind."""

import os
import re
from pathlib import Path

import pytest
import torch

from gplq_mm.integrations.mm.checkpoints import resume
from gplq_mm.integrations.mm.checkpoints.resume import resumable_checkpoint
from gplq_mm.integrations.mm.launch.errors import ConfigError


def save(path: Path, age: int) -> Path:
    torch.save({'state_dict': {'w': torch.ones(1000)}}, path)
    os.utime(path, (1_000_000 - age, 1_000_000 - age))
    return path


def test_the_named_checkpoint_comes_first(tmp_path: Path) -> None:
    named = save(tmp_path / 'epoch_1.pth', age=9)
    save(tmp_path / 'epoch_2.pth', age=0)
    (tmp_path / 'last_checkpoint').write_text(str(named))
    assert resumable_checkpoint(tmp_path) == str(named)


def test_an_emptied_marker_does_not_lose_the_run(tmp_path: Path) -> None:
    save(tmp_path / 'gplq_calibrated.pth', age=9)
    newest = save(tmp_path / 'iter_20.pth', age=1)
    (tmp_path / 'last_checkpoint').write_text('')
    assert resumable_checkpoint(tmp_path) == str(newest)


def test_a_torn_checkpoint_is_passed_over(tmp_path: Path) -> None:
    whole = save(tmp_path / 'iter_10.pth', age=5)
    torn = save(tmp_path / 'iter_20.pth', age=1)
    torn.write_bytes(torn.read_bytes()[:-200])
    assert resumable_checkpoint(tmp_path) == str(whole)


def test_weights_without_training_state_are_no_candidates(tmp_path: Path) -> None:
    save(tmp_path / 'gplq_stage1.pth', age=1)
    save(tmp_path / 'gplq_final.pth', age=0)
    assert resumable_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    ('named', 'says'),
    [
        ('iter_30.pth', 'which does not exist; resuming from the newest complete checkpoint, .*20'),
        ('iter_25.pth', r'which cannot be read \(.*truncated.*resuming from the newest .*iter_20'),
        ('x' * 5000, 'which does not exist; resuming'),
        (b'\xff\xfe', 'names no path, which does not exist; resuming'),
    ],
)
def test_a_named_checkpoint_that_is_gone_or_torn_is_replaced_and_told(
    tmp_path: Path, named: str | bytes, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / 'iter_10.pth', age=9)
    newest = save(tmp_path / 'iter_20.pth', age=5)
    torn = save(tmp_path / 'iter_25.pth', age=1)
    torn.write_bytes(torn.read_bytes()[:-200])
    (tmp_path / 'last_checkpoint').write_bytes(
        named if isinstance(named, bytes) else named.encode()
    )
    messages: list[str] = []
    monkeypatch.setattr(resume, 'print_log', lambda text, **_: messages.append(text))
    assert resumable_checkpoint(tmp_path) == str(newest)
    assert re.search(says, '\n'.join(messages))


def test_a_named_checkpoint_that_is_gone_is_refused_where_no_other_is(tmp_path: Path) -> None:
    (tmp_path / 'last_checkpoint').write_text('iter_30.pth')
    with pytest.raises(ConfigError, match='which does not exist; .* without --resume'):
        resumable_checkpoint(tmp_path)
