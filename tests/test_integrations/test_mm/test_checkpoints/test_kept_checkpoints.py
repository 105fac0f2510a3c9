# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""With `max_keep_ckpts=1` a complete checkpoint exists at every moment, and one in the end."""

from pathlib import Path
from typing import Any

import mmengine.runner.runner as of_runner
import pytest
from mmengine.hooks import CheckpointHook

from gplq_mm.integrations.mm.checkpoints.kept_checkpoints import keep_while_writing_
from tests.helpers.runners import gplq_config, make_runner
from tests.helpers.tiny_projects import TinyProject


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob('epoch_*.pth'))


def test_the_one_checkpoint_is_kept_until_the_next_is_complete(
    project: TinyProject, fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: dict[str, list[str]] = {}
    write = of_runner.save_checkpoint

    def note(checkpoint: dict[str, Any], path: str, **options: Any) -> None:
        there.setdefault(Path(path).name, saved(tmp_path))  # what a kill would leave
        write(checkpoint, path, **options)

    monkeypatch.setattr(of_runner, 'save_checkpoint', note)
    cfg = gplq_config(project, fp32, tmp_path)
    cfg.train_dataloader.batch_size = 20
    cfg.train_cfg.update(max_epochs=3, val_interval=3)
    cfg.default_hooks.checkpoint.update(max_keep_ckpts=1, save_best='auto')
    make_runner(cfg).train()
    assert there['epoch_2.pth'] == ['epoch_1.pth']
    assert there['epoch_3.pth'] == ['epoch_2.pth']
    assert saved(tmp_path) == ['epoch_3.pth']


def test_other_numbers_are_left_alone() -> None:
    hooks = [CheckpointHook(max_keep_ckpts=number) for number in (-1, 1, 2)]
    assert keep_while_writing_(hooks) == hooks[1:2]
    assert [hook.max_keep_ckpts for hook in hooks] == [-1, 2, 2]
