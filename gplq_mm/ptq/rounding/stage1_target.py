# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Weights that make up for the errors of the layers before, fitted with a check."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...stream import CallStore
from ...stream.distributed import world
from .hessian import damped, stable_cholesky

_DAMPINGS = (0.1, 1.0, 10.0)


@dataclass
class Target:
    """What a layer's float weights should be, so that its output is that of stage 1.

    The least-squares change ``W (sum (p - q) q^T) H^-1`` follows what the errors of the layers
    before have in common with the input. From few images most of it is chance, so it is damped
    as is best for the other half of the images, and left out where it does not help there.

    Attributes:
        hessians: ``sum q q^T`` of either half of the images, ``(groups, columns, columns)``.
        crosses: ``sum (p - q) q^T`` likewise; p: stage-1 codes, q: those of the quantized model.
    """

    hessians: list[Tensor]
    crosses: list[Tensor]

    def retargeted(self, rows: Tensor, damping: float) -> Tensor:
        """The weights to round.

        Args:
            rows: Float weights, ``(groups, rows, columns)``, float64.
            damping: The least that the Hessian's diagonal is raised by, relative to its mean.
        """
        strengths = sorted({damping, *(d for d in _DAMPINGS if d > damping)})
        gains = [self.gain(rows, strength) for strength in strengths]
        best = max(range(len(gains)), key=gains.__getitem__)
        if not gains[best] > 0:
            return rows
        hessian, cross = torch.stack(self.hessians).sum(0), torch.stack(self.crosses).sum(0)
        return rows + change(rows, hessian, cross, strengths[best])

    def gain(self, rows: Tensor, damping: float) -> float:
        """By how much the squared output error falls on the half that was not fitted to."""
        gain = 0.0
        for fitted, other in ((0, 1), (1, 0)):
            found = change(rows, self.hessians[fitted], self.crosses[fitted], damping)
            product = rows @ self.crosses[other]
            gain += float((found * (2 * product - found @ self.hessians[other])).sum())
        return gain


def change(rows: Tensor, hessian: Tensor, cross: Tensor, damping: float) -> Tensor:
    """Least-squares change of weight rows, see ``Target``; shapes as there."""
    lower = stable_cholesky(damped(hessian, damping))
    return torch.cholesky_solve((rows @ cross).transpose(1, 2), lower).transpose(1, 2)


def image_numbers(inputs: CallStore) -> list[int]:
    """Number over all ranks of the batch of images that each kept call belongs to."""
    rank, size = world()
    return [rank + size * i for i, calls in enumerate(inputs.batches) for _ in range(calls)]
