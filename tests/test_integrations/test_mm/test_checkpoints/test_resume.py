# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The checkpoint that a killed run goes on from, whatever the kill left behind."""

import os
from pathlib import Path

import torch

from gplq_mm.integrations.mm.checkpoints.resume import resumable_checkpoint


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
