# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Errors of other libraries, raised by these libraries."""

import errno
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mmcv.transforms import LoadImageFromFile
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import CheckpointLoader
from torch.utils.data import DataLoader, Dataset

from gplq_mm.integrations.mm.launch.library_errors import explain_library_error


class Images(Dataset):
    """One image, loaded as mmcv does."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> np.ndarray:
        return LoadImageFromFile()({'img_path': self.path})['img']


def explained(act: Callable[[], object]) -> str:
    with pytest.raises(Exception) as caught:
        act()
    line = explain_library_error(caught.value)
    assert line is not None
    assert '\n' not in line
    return line


@pytest.mark.parametrize('workers', [0, 1])
def test_a_damaged_image_is_named(tmp_path: Path, workers: int) -> None:
    path = tmp_path / 'a.jpg'
    path.write_bytes(b'\xff\xd8\xff\xe0 no image')
    loader = DataLoader(Images(str(path)), num_workers=workers)
    assert explained(lambda: next(iter(loader))).startswith(f'the image {path} cannot be decoded')


def test_annotations_without_masks_are_explained() -> None:
    transforms = pytest.importorskip('mmdet.datasets.transforms')
    load = transforms.LoadAnnotations(with_mask=True)
    instance = {'bbox': [0, 0, 1, 1], 'bbox_label': 0, 'ignore_flag': 0}
    results = {'instances': [instance], 'ori_shape': (4, 4), 'img_shape': (4, 4)}
    assert 'have no masks' in explained(lambda: load(results))


@pytest.mark.parametrize('name', ['open-mmlab://nowhere', 'https://127.0.0.1:9/nowhere.pth'])
def test_a_checkpoint_that_is_nowhere_is_named(name: str) -> None:
    line = explained(lambda: CheckpointLoader.load_checkpoint(name))
    assert line.startswith(f'the checkpoint {name} cannot be loaded: ')


def test_an_unknown_type_is_named() -> None:
    line = explained(lambda: MODELS.build({'type': 'Nowhere'}))
    assert re.match('Nowhere is not in the mm[a-z]+::model registry', line)


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_disk_that_takes_nothing_is_explained(number: int) -> None:
    def write() -> None:
        raise OSError(number, os.strerror(number), '/x/epoch_1.pth')

    line = explained(write)
    assert f'/x/epoch_1.pth: {os.strerror(number)}; ' in line
    assert '--resume' in line


def test_torch_on_a_full_disk_is_explained(tmp_path: Path) -> None:
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, former[1]))  # Python ignores its signal
    try:
        line = explained(lambda: torch.save(torch.zeros(10**5), tmp_path / 'a.pth'))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert 'is the disk full?' in line or 'ulimit' in line


@pytest.mark.parametrize(
    'error', [KeyError('mask'), RuntimeError('x'), OSError(errno.EIO, 'x'), AssertionError('a')]
)
def test_other_errors_keep_their_words(error: Exception) -> None:
    assert explain_library_error(error) is None
