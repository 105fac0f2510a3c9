# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Feature mimicking in the leading principal components of the teacher's features.

Source: GPLQ (arXiv 2506.11784), section 3.2:
``L = 1/N sum_i || (f_s^i - f_t^i) V ||^2``. The mean of the features cancels.
"""

import torch
from torch import Tensor, nn


class PCAMimicLoss(nn.Module):
    """Squared distance of features within the span of the given components.

    Args:
        components: Orthonormal columns ``(C, K)``.

    Examples:
        >>> import torch
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
        with torch.autocast(student.device.type, enabled=False):
            difference = (student.float() - teacher.float()) @ self.components
            return difference.square().sum(-1).mean()
