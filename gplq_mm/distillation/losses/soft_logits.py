# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Logit distillation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SoftLogitLoss(nn.Module):
    """KL divergence of softened class distributions times T^2 (arXiv 1503.02531, section 2).

    Args:
        temperature: Temperature T of the softmax, positive.
        multi_label: Each logit is a separate probability (sigmoid): the divergences of the
            classes are summed.

    Raises:
        ValueError: If ``temperature`` is not positive.

    Examples:
        >>> loss = SoftLogitLoss()
        >>> import torch
        >>> loss(torch.zeros(1, 3), torch.zeros(1, 3))
        tensor(0.)
    """

    def __init__(self, temperature: float = 1.0, multi_label: bool = False) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f'temperature={temperature}: write a positive number')
        self.temperature, self.multi_label = temperature, multi_label

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean over the batch; both ``(N, classes)``."""
        t = self.temperature
        if self.multi_label:  # two classes per logit: the class and its complement
            student, teacher = (
                torch.stack([x, torch.zeros_like(x)], -1) for x in (student, teacher)
            )
        log_p = F.log_softmax(student.float() / t, dim=-1)
        log_q = F.log_softmax(teacher.float() / t, dim=-1)
        return F.kl_div(log_p, log_q, reduction='batchmean', log_target=True) * t * t
