# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Streaming PCA against an SVD, and equality of one rank and two."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from gplq_mm.distillation.streaming_pca import PCAStatistics, num_components


def low_rank_features(samples: int = 400, dim: int = 96, rank: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(rank, dim, generator=generator)
    return torch.randn(samples, rank, generator=generator) @ basis + 3.0


def test_streaming_pca_spans_the_leading_directions_of_an_svd() -> None:
    features = low_rank_features()
    statistics = PCAStatistics(features.shape[1])
    for part in features.split(64):
        statistics.update(part)
    components = statistics.components(0.6)
    number = components.shape[1]
    assert number % 32 == 0
    _, _, right = torch.linalg.svd(features.double() - features.double().mean(0))
    ours, oracle = components.double(), right[:number].T
    assert torch.allclose(ours @ ours.T, oracle @ oracle.T, atol=1e-4)


def test_pca_keeps_all_components_when_asked_for_all_variance() -> None:
    statistics = PCAStatistics(96)
    statistics.update(torch.randn(400, 96, generator=torch.Generator().manual_seed(0)))
    assert statistics.components(1.0).shape == (96, 96)


def test_fewer_samples_than_components_is_an_error() -> None:
    statistics = PCAStatistics(64)
    statistics.update(torch.randn(8, 64))
    with pytest.raises(ValueError, match='8 samples cannot give 32 components'):
        statistics.components(0.6)


@pytest.mark.parametrize('share', [0.0, 1.1])
def test_a_share_outside_0_1_is_an_error(share: float) -> None:
    with pytest.raises(ValueError, match='explained_variance'):
        PCAStatistics(4).components(share)


def test_the_number_is_rounded_to_a_multiple_of_32() -> None:
    falling = torch.linspace(1, 0, 192)
    found = [num_components(falling, share) for share in (0.1, 0.5, 0.6, 0.9, 1.0)]
    assert found == [32, 64, 64, 128, 192]
    assert num_components(falling[:40], 0.9) == 32


def test_nan_in_a_feature_is_an_error() -> None:
    statistics = PCAStatistics(4)
    statistics.update(torch.full((5, 4), float('nan')))
    with pytest.raises(ValueError, match='NaN or infinite'):
        statistics.components(0.6)


def share_of(rank: int, size: int) -> PCAStatistics:
    """The statistics of one rank's batches, reduced."""
    statistics = PCAStatistics(96)
    for part in low_rank_features().split(16)[rank::size]:
        statistics.update(part)
    statistics.reduce()
    return statistics


def work(rank: int, folder: str) -> None:
    dist.init_process_group('gloo', init_method=f'file://{folder}/init', rank=rank, world_size=2)
    torch.set_num_threads(1)
    statistics = share_of(rank, 2)
    torch.save((statistics.count, statistics.components(0.6)), f'{folder}/{rank}.pt')
    dist.destroy_process_group()


def test_two_ranks_find_the_bits_of_one(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    one = share_of(0, 1)
    expected: tuple[int, Tensor] = one.count, one.components(0.6)
    for rank in range(2):
        count, components = torch.load(tmp_path / f'{rank}.pt', weights_only=True)
        assert count == expected[0] == 400
        assert torch.equal(components, expected[1])
