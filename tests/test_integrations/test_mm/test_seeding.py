# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Random streams depend on seed and epoch, in the main process and in the workers."""

import io
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from gplq_mm.integrations.mm import seeding
from gplq_mm.integrations.mm.seeding import random_state, seed_epoch, set_random_state

Draw = tuple[float, float, float]


def draw() -> Draw:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


class Random(Dataset):
    """Items are random numbers, as augmentations are."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Draw:
        return draw()


def loader(workers: int, persistent: bool = False) -> DataLoader:
    # mmengine leaves the order to its sampler; here it is the identity
    return DataLoader(Random(), num_workers=workers, persistent_workers=persistent, collate_fn=list)


def epoch(dataloader: DataLoader, seed: int, number: int) -> list[Draw]:
    seed_epoch(dataloader, seed, number)
    return [*(item for batch in dataloader for item in batch), draw()]


@pytest.mark.parametrize(('workers', 'persistent'), [(0, False), (2, False), (2, True)])
def test_an_epoch_is_the_same_whatever_ran_before(workers: int, persistent: bool) -> None:
    uninterrupted = loader(workers, persistent)
    epochs = [epoch(uninterrupted, 7, number) for number in range(2)]
    assert not set(epochs[0]) & set(epochs[1])
    [draw() for _ in range(5)]
    assert epoch(loader(workers, persistent), 7, 1) == epochs[1]


def test_seeds_and_workers_draw_apart() -> None:
    one, two = epoch(loader(2), 1, 0), epoch(loader(0), 2, 0)
    assert len(set(one[:4])) == 4
    assert not set(one) & set(two)
    for source in zip(*one[:4], strict=True):
        assert len(set(source)) == 4


def test_ranks_draw_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    for rank in range(3):
        monkeypatch.setattr(seeding, 'get_rank', lambda rank=rank: rank)
        drawn += epoch(loader(0), 1, 0)
    assert len(set(drawn)) == len(drawn)


def test_large_seeds_are_allowed() -> None:
    assert epoch(loader(0), 2**32 - 1, 10**6) == epoch(loader(0), 2**32 - 1, 10**6)


def test_a_state_survives_a_safe_checkpoint() -> None:
    np.random.standard_normal()  # leaves a cached value
    random.gauss(0, 1)
    file = io.BytesIO()
    torch.save(random_state(), file)
    expected = [draw(), random.gauss(0, 1), np.random.standard_normal(), draw()]
    file.seek(0)
    set_random_state(torch.load(file, weights_only=True))
    assert [draw(), random.gauss(0, 1), np.random.standard_normal(), draw()] == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_state_that_was_moved_to_a_gpu_is_restored() -> None:
    file = io.BytesIO()
    torch.save(random_state(), file)
    expected = [draw(), torch.rand(2, device='cuda').tolist()]
    file.seek(0)
    set_random_state(torch.load(file, weights_only=True, map_location='cuda'))
    assert [draw(), torch.rand(2, device='cuda').tolist()] == expected
