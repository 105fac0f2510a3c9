# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Feature mimicking in the leading principal components of the teacher's features.

Source: GPLQ (arXiv 2506.11784), section 3.2:
``L = 1/N sum_i || (f_s^i - f_t^i) V ||^2``, V = components that explain about 60 %
of the variance, their number rounded to a multiple of 32. The mean cancels.
"""

import torch
from torch import Tensor, nn

COMPONENT_MULTIPLE = 32


class PCAStatistics:
    """Streaming first and second moments of features, exact to float64.

    Args:
        dim: Feature width C.
        device: Where the moments are kept.
    """

    def __init__(self, dim: int, device: torch.device | str = 'cpu') -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.total = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Add ``(N, C)`` features."""
        x = features.detach().double()
        self.count += len(x)
        self.total += x.sum(0)
        self.outer += x.T @ x

    def tensors(self) -> list[Tensor]:
        """The sums, to be reduced over ranks in place."""
        return [self.count, self.total, self.outer]

    def components(self, explained_variance: float) -> Tensor:
        """Leading components.

        Args:
            explained_variance: Share of the variance to keep, in (0, 1].

        Returns:
            Orthonormal columns ``(C, K)``, K a multiple of 32 or C.

        Raises:
            ValueError: If the share is not in (0, 1] or there are fewer samples
                than components.
        """
        if not 0 < explained_variance <= 1:
            raise ValueError(f'explained_variance={explained_variance}: write a share in (0, 1]')
        mean = self.total / self.count
        covariance = self.outer / self.count - torch.outer(mean, mean)
        values, vectors = torch.linalg.eigh(covariance)
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        share = values.cumsum(0) / values.sum().clamp_min(1e-30)
        wanted = int((share < explained_variance).sum()) + 1
        rounded = max(COMPONENT_MULTIPLE, round(wanted / COMPONENT_MULTIPLE) * COMPONENT_MULTIPLE)
        number = min(rounded, len(values))
        if int(self.count) < number:
            raise ValueError(
                f'PCA of {int(self.count)} samples cannot give {number} components; use at least '
                f'{number} calibration images (recipe.calibration.num_images)'
            )
        return vectors[:, :number].float()


class PCAMimicLoss(nn.Module):
    """Squared distance of features within the span of the given components.

    Args:
        components: Orthonormal columns ``(C, K)``.

    Examples:
        >>> loss = PCAMimicLoss(torch.eye(3)[:, :1])
        >>> loss(torch.tensor([[2.0, 9.0, 9.0]]), torch.zeros(1, 3))
        tensor(4.)
    """

    components: Tensor

    def __init__(self, components: Tensor) -> None:
        super().__init__()
        self.register_buffer('components', components, persistent=False)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean over ``(N, C)`` features of the projected squared distance."""
        difference = (student.float() - teacher.float()) @ self.components
        return difference.square().sum(-1).mean()
