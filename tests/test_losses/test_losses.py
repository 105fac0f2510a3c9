# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Mimicking losses against independent formulas."""

import pytest
import torch
from torch import nn

from gplq_mm.losses import PCAMimicLoss, PCAStatistics, RelativeFeatureLoss, SoftLogitLoss


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


def test_pca_loss_ignores_what_lies_outside_its_span_and_the_mean() -> None:
    components = torch.eye(8)[:, :3]
    loss = PCAMimicLoss(components)
    student = torch.randn(5, 8)
    teacher = student.clone()
    teacher[:, 3:] += 7
    assert loss(student, teacher) == 0
    teacher[:, 0] += 2
    assert torch.isclose(loss(student, teacher), torch.tensor(4.0))


def test_fewer_samples_than_components_is_an_error() -> None:
    statistics = PCAStatistics(64)
    statistics.update(torch.randn(8, 64))
    with pytest.raises(ValueError, match='8 samples cannot give 32 components'):
        statistics.components(0.6)


@pytest.mark.parametrize('share', [0.0, 1.1])
def test_a_share_outside_0_1_is_an_error(share: float) -> None:
    with pytest.raises(ValueError, match='explained_variance'):
        PCAStatistics(4).components(share)


def test_relative_feature_loss_does_not_depend_on_units() -> None:
    loss = RelativeFeatureLoss()
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    value = loss([student], [teacher])
    assert torch.isclose(loss([student * 10], [teacher * 10]), value, rtol=1e-5)
    oracle = ((student - teacher) ** 2).sum() / (teacher**2).sum()
    assert torch.isclose(value, oracle)


def test_relative_feature_loss_refuses_other_levels() -> None:
    with pytest.raises(ValueError, match='1 student levels for 2 teacher levels'):
        RelativeFeatureLoss()([torch.ones(1)], [torch.ones(1), torch.ones(1)])


def test_soft_logit_loss_has_the_gradient_of_soft_cross_entropy() -> None:
    student = torch.randn(4, 10, requires_grad=True)
    teacher = torch.randn(4, 10)
    SoftLogitLoss()(student, teacher).backward()
    twin = student.detach().clone().requires_grad_()
    nn.functional.cross_entropy(twin, teacher.softmax(-1)).backward()
    assert torch.allclose(student.grad, twin.grad, atol=1e-6)
    assert SoftLogitLoss(2.0)(teacher, teacher) == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ValueError, match='temperature'):
        SoftLogitLoss(0.0)
