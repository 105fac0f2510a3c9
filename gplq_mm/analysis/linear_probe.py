# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Linear probe on extracted features: measures how well a backbone fits another data set."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ProbeSettings:
    """Training settings of a linear probe; the defaults are those of GPLQ, section 4.

    Attributes:
        epochs: Passes over the training features.
        lr: Learning rate of AdamW at the start; it falls to zero along a cosine.
        batch_size: Features per step.
    """

    epochs: int = 100
    lr: float = 1e-3
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name in ('epochs', 'batch_size', 'lr'):
            if getattr(self, name) <= 0:
                raise ValueError(f'{name}={getattr(self, name)!r}: write a positive number')


def train_linear_probe(
    features: Tensor, labels: Tensor, num_classes: int, settings: ProbeSettings, seed: int = 0
) -> nn.Linear:
    """Train a linear classifier on fixed features.

    Args:
        features: ``(N, C)``.
        labels: Classes as integers, ``(N,)``.
        num_classes: Number of classes.
        settings: Epochs, learning rate, batch size.
        seed: Seed of the initial weights and the order of the features.

    Returns:
        The classifier, on the device of the features.

    Raises:
        ValueError: If there are no features, or a label is not a class.
    """
    if len(features) == 0 or len(features) != len(labels):
        raise ValueError(f'a probe needs features and as many labels; got {len(features)}')
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(
            f'labels go from {int(labels.min())} to {int(labels.max())}, but num_classes is '
            f'{num_classes}; write the number of classes of the data set'
        )
    generator = torch.Generator().manual_seed(seed)
    head = nn.utils.skip_init(nn.Linear, features.shape[1], num_classes)
    nn.init.normal_(head.weight, std=0.01, generator=generator)
    nn.init.zeros_(head.bias)
    head.to(features.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=settings.lr)
    steps = settings.epochs * -(-len(features) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(settings.epochs):
        order = torch.randperm(len(features), generator=generator).to(features.device)
        for chosen in order.split(settings.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(head(features[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    return head


@torch.no_grad()
def probe_accuracy(head: nn.Linear, features: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in percent.

    Args:
        head: The probe.
        features: ``(N, C)``.
        labels: ``(N,)``.

    Examples:
        >>> head = nn.Linear(2, 2, bias=False)
        >>> _ = head.load_state_dict({'weight': torch.eye(2)})
        >>> probe_accuracy(head, torch.eye(2), torch.tensor([0, 0]))
        50.0
    """
    return 100.0 * (head(features).argmax(1) == labels).double().mean().item()
