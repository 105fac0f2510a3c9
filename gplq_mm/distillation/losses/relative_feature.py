# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Feature mimicking: keeps the student's features close to those of the float teacher."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class RelativeFeatureLoss(nn.Module):
    """Squared feature error relative to the teacher's squared norm, mean over levels.

    ``mean_l ||f_s - f_t||^2 / ||f_t||^2``: it has no unit, so one loss weight fits all pyramid
    levels and models.

    Examples:
        >>> loss = RelativeFeatureLoss()
        >>> loss([torch.full((1, 2), 1.1)], [torch.ones(1, 2)])
        tensor(0.0100)
    """

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Loss of feature maps.

        Args:
            student: One tensor per level, e.g. ``(B, C, H, W)``.
            teacher: Tensors of the same shapes.

        Raises:
            ValueError: If the numbers of levels differ or there is none.
        """
        if len(student) != len(teacher) or not student:
            raise ValueError(f'{len(student)} student levels for {len(teacher)} teacher levels')
        terms = [
            (s.float() - t.float()).square().sum() / t.float().square().sum().clamp_min(1e-12)
            for s, t in zip(student, teacher, strict=True)
        ]
        return torch.stack(terms).mean()
