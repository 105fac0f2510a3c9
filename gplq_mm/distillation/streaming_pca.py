# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Streaming PCA of the teacher's features, bit-equal for every split of images over ranks.

Source: GPLQ (arXiv 2506.11784), section 3.2: components that explain about 60 % of
the variance, their number rounded to a multiple of 32.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from ..stream.distributed import world
from ..stream.exact_sum import ExactSum

COMPONENT_MULTIPLE = 32


class PCAStatistics:
    """First and second moments of features, summed exactly (see ``ExactSum``).

    Args:
        dim: Feature width C.
        device: Device of the moments.
    """

    def __init__(self, dim: int, device: torch.device | str = 'cpu') -> None:
        self.dim = dim
        self.device = torch.device(device)
        self._products = ExactSum((dim + 1, dim + 1), self.device)  # [x 1]^T [x 1]

    def update(self, features: Tensor) -> None:
        """Add ``(N, C)`` features; a batch is one term of the sum."""
        x = features.detach().to(self.device).double()
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        self._products.add(x.T @ x)

    def reduce(self) -> None:
        """Sum over all ranks; does nothing without a process group."""
        self._products.reduce()

    @property
    def count(self) -> int:
        """Features added."""
        return int(self._products.value()[self.dim, self.dim])

    def components(self, explained_variance: float) -> Tensor:
        """Leading components, the same on all ranks.

        Args:
            explained_variance: Share of the variance to keep, in (0, 1].

        Returns:
            Orthonormal columns ``(C, K)``, float32, on the CPU; K is a multiple of 32, or C.

        Raises:
            ValueError: If the share is not in (0, 1], a feature was NaN or infinite, or
                there are fewer samples than components.
        """
        if not 0 < explained_variance <= 1:
            raise ValueError(f'explained_variance={explained_variance}: write a share in (0, 1]')
        products = self._products.value().cpu()
        if not products.isfinite().all():
            raise ValueError('PCA: a feature of the float teacher is NaN or infinite')
        total, outer = products[self.dim, : self.dim], products[: self.dim, : self.dim]
        mean = total / max(self.count, 1)
        covariance = outer / max(self.count, 1) - torch.outer(mean, mean)
        values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
        number = num_components(values.flip(0), explained_variance)
        if self.count < number:
            raise ValueError(
                f'PCA of {self.count} samples cannot give {number} components; write '
                f'mimic=dict(num_images={number}) or more, or a smaller explained_variance'
            )
        return _from_rank_0(vectors.flip(1)[:, :number].float().contiguous(), self.device)


def num_components(variances: Tensor, explained_variance: float) -> int:
    """Number of components to keep: a multiple of 32, or all.

    Args:
        variances: ``(C,)``, largest first.
        explained_variance: Share of their sum to keep.

    Examples:
        >>> num_components(torch.ones(192), 0.6), num_components(torch.ones(16), 0.6)
        (128, 16)
    """
    variances = variances.clamp_min(0)
    share = variances.cumsum(0) / variances.sum().clamp_min(1e-30)
    needed = int((share < explained_variance).sum()) + 1
    rounded = max(COMPONENT_MULTIPLE, round(needed / COMPONENT_MULTIPLE) * COMPONENT_MULTIPLE)
    return min(rounded, len(variances))


def _from_rank_0(components: Tensor, device: torch.device) -> Tensor:
    """Broadcast rank 0's basis; factorizations differ between ranks."""
    if world()[1] == 1:
        return components
    shared = components.to(device)
    dist.broadcast(shared, 0)
    return shared.cpu()
