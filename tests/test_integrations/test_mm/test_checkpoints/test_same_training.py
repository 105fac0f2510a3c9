# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""A resumed run with other settings than the checkpoint's is refused, and each is named."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
from mmengine.config import Config

from gplq_mm.integrations.mm.checkpoints.checkpoint_io import read_checkpoint
from gplq_mm.integrations.mm.checkpoints.same_training import require_same_training
from gplq_mm.integrations.mm.hook import GPLQHook
from gplq_mm.integrations.mm.resumable_loop import ResumableEpochLoop
from gplq_mm.recipe import as_recipe
from tests.test_integrations.test_mm.conftest import FinishedRun


def resume(finished: FinishedRun, recipe: dict[str, Any] | None = None, **options: Any) -> None:
    """Compare the checkpoint of a finished run with its config, some keys changed."""
    cfg: Config = copy.deepcopy(finished.runner.cfg)
    cfg.merge_from_dict(options)
    checkpoint = read_checkpoint(finished.work_dir / 'epoch_1.pth')
    made_with = checkpoint['gplq']['recipe']
    now = {**made_with, **{k: {**made_with[k], **v} for k, v in (recipe or {}).items()}}
    require_same_training(checkpoint, cfg, as_recipe(now).as_dict())


@pytest.mark.parametrize(
    ('changed', 'named'),
    [
        ({'randomness.seed': 4}, 'randomness.seed: 3 != 4'),
        ({'train_dataloader.batch_size': 8}, 'train_dataloader.batch_size: 4 != 8'),
        ({'optim_wrapper.optimizer': dict(lr=0.1)}, 'optim_wrapper.optimizer: '),
        ({'param_scheduler': [dict(type='LinearLR')]}, 'param_scheduler: [] != [{'),
        ({'recipe': dict(calibration=dict(seed=5))}, 'recipe.calibration.seed: 0 != 5'),
        ({'recipe': dict(optim=dict(lr=0.5))}, 'recipe.optim.lr: '),
    ],
)
def test_a_changed_setting_is_named_with_both_values(
    finished: FinishedRun, changed: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match='a resumed run goes on with the settings') as caught:
        resume(finished, **changed)
    assert named in str(caught.value)
    assert 'without --resume' in str(caught.value)


@pytest.mark.parametrize(
    'changed',
    [
        {},
        {'train_cfg.max_epochs': 7},
        {'train_dataloader.dataset.data_root': '/moved'},
        {'recipe': dict(weight=dict(ptq='mse'))},
        {'recipe': dict(stage2=dict(num_images=3))},
    ],
)
def test_what_the_resumed_run_follows_may_change(
    finished: FinishedRun, changed: dict[str, Any]
) -> None:
    assert resume(finished, **changed) is None  # type: ignore[func-returns-value]


def test_a_config_with_more_than_plain_values_is_still_compared_by_seed(
    finished: FinishedRun,
) -> None:
    checkpoint = read_checkpoint(finished.work_dir / 'epoch_1.pth')
    checkpoint['meta']['cfg'] = 'x = open("y")'
    recipe = checkpoint['gplq']['recipe']
    cfg = Config(dict(randomness=dict(seed=3)))
    assert require_same_training(checkpoint, cfg, recipe) is None  # type: ignore[func-returns-value]
    cfg.randomness.seed = 4
    with pytest.raises(ValueError, match=r'randomness\.seed: 3 != 4'):
        require_same_training(checkpoint, cfg, recipe)


def test_the_hook_compares_before_it_resumes(finished: FinishedRun) -> None:
    hook = GPLQHook()
    hook.session = object()  # type: ignore[assignment]
    cfg = copy.deepcopy(finished.runner.cfg)
    cfg.train_dataloader.batch_size = 8
    runner: Any = SimpleNamespace(model=finished.runner.model, cfg=cfg, _resume=True)
    with pytest.raises(ValueError, match=r'train_dataloader\.batch_size: 4 != 8'):
        hook.after_load_checkpoint(runner, read_checkpoint(finished.work_dir / 'epoch_1.pth'))


def test_epochs_of_another_length_are_refused_by_the_resumable_loop() -> None:
    loop: Any = SimpleNamespace(iter=18, epoch=0, dataloader=[None] * 10)
    with pytest.raises(ValueError, match='iteration 18 is not in epoch 1 of 10 batches: .* same'):
        ResumableEpochLoop.run_epoch(loop)
