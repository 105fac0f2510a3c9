# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import pytest
import torch

from gplq_mm.analysis.linear_probe import ProbeSettings, probe_accuracy, train_linear_probe


def clusters(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three separable clusters in ten dimensions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    noise = torch.randn(count, 10, generator=generator)
    return torch.eye(10)[labels] * 6 + noise, labels


def test_separable_classes_are_told_apart():
    settings = ProbeSettings(epochs=60, lr=1e-2, batch_size=16)
    head = train_linear_probe(*clusters(120, 0), 3, settings)
    assert probe_accuracy(head, *clusters(90, 1)) > 97


def test_seed_decides_everything():
    one, same, other = (
        train_linear_probe(*clusters(30, 0), 3, ProbeSettings(epochs=2), seed) for seed in (4, 4, 5)
    )
    assert torch.equal(one.weight, same.weight)
    assert not torch.equal(one.weight, other.weight)


def test_global_random_state_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    train_linear_probe(*clusters(30, 0), 3, ProbeSettings(epochs=1))
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize('options', [dict(epochs=0), dict(lr=-1.0), dict(batch_size=0)])
def test_bad_settings(options):
    with pytest.raises(ValueError, match='write a positive number'):
        ProbeSettings(**options)


def test_bad_data():
    features, labels = clusters(9, 0)
    with pytest.raises(ValueError, match='labels go from 0 to 2, but num_classes is 2'):
        train_linear_probe(features, labels, 2, ProbeSettings())
    with pytest.raises(ValueError, match='needs features and as many labels; got 0'):
        train_linear_probe(features[:0], labels[:0], 3, ProbeSettings())
