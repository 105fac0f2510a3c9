# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Calibration images: which are drawn, how they are read, what is refused."""

import copy
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope

pytest.importorskip('mmpretrain')

from gplq_mm.integrations.mm.data import calibration_data
from gplq_mm.integrations.mm.data.calibration_data import (
    CalibrationSet,
    image_identity,
    with_pipeline,
)
from tests.helpers.runners import float_config
from tests.helpers.tiny_projects import TinyProject


@pytest.fixture
def cfg(project: TinyProject) -> Config:
    """Config whose train pipeline differs from the test pipeline in size and by a flip."""
    cfg = float_config(project)
    train = cfg.train_dataloader.dataset
    train.pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=16),
        dict(type='RandomFlip', prob=1.0),
        dict(type='PackInputs'),
    ]
    return cfg


def draw(cfg: Any, num_images: int = 6, seed: int = 0, batch_size: int = 4) -> CalibrationSet:
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return CalibrationSet(cfg, num_images, seed, batch_size)


def test_the_draw_depends_on_the_seed_only(cfg: Config) -> None:
    first, again, other = draw(cfg), draw(cfg), draw(cfg, seed=1)
    assert first.indices == again.indices
    assert first.indices != other.indices
    assert len(set(first.indices)) == 6
    assert [len(b) for b in first.batches] == [4, 2]
    assert [i for batch in first.batches for i in batch] == first.indices
    assert draw(cfg, num_images=9).indices[:6] == first.indices


def test_training_images_come_through_the_test_pipeline(cfg: Config) -> None:
    calibration = draw(cfg, num_images=3, batch_size=3)
    (batch,) = calibration
    assert batch['inputs'].shape == (3, 3, 32, 32)
    assert [os.path.realpath(s.img_path) for s in batch['data_samples']] == calibration.paths
    assert all('/train/' in p for p in calibration.paths if p)
    import cv2

    image = torch.from_numpy(cv2.imread(str(calibration.paths[0])))
    assert torch.equal(batch['inputs'][0], image.permute(2, 0, 1))


def test_resampling_wrappers_are_taken_off(cfg: Config) -> None:
    plain = draw(cfg)
    inner = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=3, dataset=inner)
    repeated = draw(cfg)
    assert len(repeated.dataset) == 40
    assert repeated.indices == plain.indices
    twice = [inner, dict(type='RepeatDataset', times=2, dataset=copy.deepcopy(inner))]
    cfg.train_dataloader.dataset = dict(type='ConcatDataset', datasets=twice)
    joined = draw(cfg)
    assert len(joined.dataset) == 80
    assert next(iter(joined))['inputs'].shape[-1] == 32


def test_mixing_wrappers_lose_their_own_pipeline() -> None:
    inner = dict(type='CocoDataset', pipeline=['augment'], ann_file='a.json')
    mixed = dict(type='mmdet.MultiImageMixDataset', dataset=inner, pipeline=['mosaic'])
    concat = dict(type='ConcatDataset', datasets=[mixed, inner])
    assert with_pipeline(mixed, ['test']) == {**inner, 'pipeline': ['test']}
    assert with_pipeline(concat, ['test'])['datasets'] == [{**inner, 'pipeline': ['test']}] * 2
    assert inner['pipeline'] == ['augment']


def test_a_fold_stays_a_fold(cfg: Config) -> None:
    whole = cfg.train_dataloader.dataset
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        fold = dict(type='KFoldDataset', dataset=copy.deepcopy(whole), num_splits=4, fold=0)
        fold['test_mode'] = name != 'train_dataloader'
        cfg[name].dataset = fold
    assert len(draw(cfg, num_images=30, batch_size=10).dataset) == 30


def test_too_few_images(cfg: Config) -> None:
    with pytest.raises(ValueError, match=r'41 images but the training set has 40.*num_images'):
        draw(cfg, num_images=41)


def test_a_small_training_set_is_taken_whole_where_nobody_gave_a_number(cfg: Config) -> None:
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        assert sorted(CalibrationSet(cfg, 41, 0, 4, all_if_fewer=True).indices) == list(range(40))


@pytest.mark.parametrize('missing', [['train_dataloader'], ['val_dataloader', 'test_dataloader']])
def test_a_missing_dataloader(cfg: Config, missing: list[str]) -> None:
    for name in missing:
        cfg[name] = None
    with pytest.raises(ValueError, match='needs train_dataloader and val_dataloader'):
        draw(cfg)


def test_the_test_pipeline_stands_in_for_a_missing_validation(cfg: Config) -> None:
    cfg.val_dataloader = None
    assert next(iter(draw(cfg)))['inputs'].shape[-1] == 32


def test_calibration_on_validation_images_is_refused(cfg: Config) -> None:
    cfg.train_dataloader.dataset.data_prefix = 'val'
    with pytest.raises(ValueError, match=r'6 of 6 calibration images are also in val_dataloader'):
        draw(cfg)


@pytest.mark.parametrize('name', ['val_dataloader', 'test_dataloader'])
def test_a_symlink_to_a_training_image_is_refused(cfg: Config, tmp_path: Path, name: str) -> None:
    root = Path(cfg.train_dataloader.dataset.data_root)
    shutil.copytree(root / 'val', tmp_path / 'mixed')
    source = draw(cfg).paths[2]
    assert source is not None
    (tmp_path / 'mixed' / 'disc' / 'innocent.png').symlink_to(source)
    cfg[name] = copy.deepcopy(cfg[name])
    cfg[name].dataset.update(data_root=str(tmp_path), data_prefix='mixed')
    with pytest.raises(ValueError, match=f'1 of 6 .* in {name}, for example {source}'):
        draw(cfg)


class InMemory(list):
    """A data set that holds pixels, as mmpretrain's CIFAR10 does."""

    def get_data_info(self, index: int) -> dict[str, Any]:
        return dict(img=self[index])


def test_images_in_memory_are_told_apart_by_their_pixels() -> None:
    a, b = np.arange(48, dtype=np.uint8).reshape(3, 4, 4), np.zeros((3, 4, 4), np.uint8)
    train, test = InMemory([a.transpose(1, 2, 0), b]), InMemory([b.copy(), a])
    identities = [image_identity(train, i) for i in range(2)]
    assert identities[0] != identities[1]
    assert image_identity(test, 0) == identities[1]
    assert image_identity(InMemory([a.transpose(1, 2, 0).copy()]), 0) == identities[0]


def test_training_needs_no_test_set(cfg: Config) -> None:
    cfg.test_dataloader = copy.deepcopy(cfg.test_dataloader)
    cfg.test_dataloader.dataset.data_prefix = 'not_here'
    assert len(draw(cfg).indices) == 6


def test_batches_are_dealt_to_ranks_in_turn(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [s.img_path for batch in draw(cfg, batch_size=2) for s in batch['data_samples']]
    shares = []
    for rank in range(2):
        monkeypatch.setattr(calibration_data, 'world', lambda rank=rank: (rank, 2))
        mine = draw(cfg, batch_size=2)
        shares.append([[s.img_path for s in batch['data_samples']] for batch in mine])
        assert len(mine) == len(shares[-1])
    assert shares[0][0] + shares[1][0] + shares[0][1] == alone


def test_fewer_batches_than_ranks(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_data, 'world', lambda: (0, 3))
    with pytest.raises(
        ValueError, match=r'2 calibration batch\(es\) cannot be distributed over 3 ranks'
    ):
        draw(cfg)


class Recorder(torch.nn.Module):
    """Remembers how it was run."""

    def __init__(self, scope: list[str]) -> None:
        super().__init__()
        self.calls: list[tuple[str, bool, bool]] = []
        coverage = type('Coverage', (), {'scope': scope})()
        self.gplq = type('State', (), {'coverage': coverage})()

    def data_preprocessor(self, batch: Any, training: bool) -> Any:
        return batch

    def extract_feat(self, inputs: torch.Tensor) -> None:
        self.calls.append(('features', self.training, torch.is_grad_enabled()))

    def test_step(self, batch: Any) -> None:
        self.calls.append(('whole', self.training, torch.is_grad_enabled()))


@pytest.mark.parametrize(
    ('scope', 'how'),
    [
        (['backbone'], 'features'),
        (['backbone', 'neck'], 'features'),
        (['backbone', 'rpn_head'], 'whole'),
        ([''], 'whole'),
    ],
)
def test_a_pass_runs_what_the_scope_needs(cfg: Config, scope: list[str], how: str) -> None:
    model = Recorder(scope).train()
    draw(cfg).run_pass(model, 'calibration')()
    assert model.calls == [(how, False, False)] * 2
    assert model.training


def test_other_images_than_those_of_the_set(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = draw(cfg, num_images=6, batch_size=3)
    behind = draw(cfg, num_images=12, batch_size=3).paths[6:]
    found = [s.img_path for batch in calibration.others(2) for s in batch['data_samples']]
    assert [os.path.realpath(p) for p in found] == behind
    monkeypatch.setattr(calibration_data, 'world', lambda: (1, 2))
    found = [s.img_path for batch in calibration.others(1) for s in batch['data_samples']]
    assert [os.path.realpath(p) for p in found] == behind[3:]
    whole = draw(cfg, num_images=len(calibration.dataset), batch_size=3)
    (same,) = whole.others(2)  # there are no others
    paths = [os.path.realpath(s.img_path) for s in same['data_samples']]
    assert paths == [p for p in whole.paths if p][3:6]


def test_the_images_that_follow_in_the_draw(cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = draw(cfg, num_images=6, batch_size=3)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        following, rest = calibration.following(5), calibration.following(1000)
    assert following.paths == draw(cfg, num_images=11, batch_size=3).paths[6:]
    assert [len(batch) for batch in following.batches] == [3, 2]
    assert len(rest.indices) == len(calibration.dataset) - 6
    whole = draw(cfg, num_images=len(calibration.dataset), batch_size=3)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        assert whole.following(4).indices == whole.indices[:4]
    monkeypatch.setattr(calibration_data, 'world', lambda: (1, 2))
    ((number, batch),) = following.numbered()
    found = [os.path.realpath(s.img_path) for s in batch['data_samples']]
    assert (number, found) == (1, following.paths[3:])
