# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Weights fitted to compensate errors of earlier layers, checked on images outside the fit."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...stream import CallStore
from ...stream.distributed import global_number
from .hessian import damped, stable_cholesky

_DAMPINGS = (0.1, 1.0, 10.0)


@dataclass
class Target:
    """Target of a layer's rounding: float weights with which its output is that of stage 1.

    The least-squares change ``W (sum (p - q) q^T) H^-1`` fits the part of the earlier layers'
    errors that is correlated with the input. With few images most of it is noise, so its
    damping is chosen on the other half of the images; without a gain there it is not used.

    Attributes:
        hessians: ``sum q q^T`` of each half of the images, ``(groups, columns, columns)``.
        crosses: ``sum (p - q) q^T``, same shape; p: stage-1 codes, q: codes of the quantized model.
    """

    hessians: list[Tensor]
    crosses: list[Tensor]

    def retargeted(self, rows: Tensor, damping: float) -> Tensor:
        """The weights to round.

        Args:
            rows: Float weights, ``(groups, rows, columns)``, float64.
            damping: Smallest damping of the Hessian's diagonal, relative to its mean.
        """
        strengths = sorted({damping, *(d for d in _DAMPINGS if d > damping)})
        gains = [self.gain(rows, strength) for strength in strengths]
        best = max(range(len(gains)), key=gains.__getitem__)
        if not gains[best] > 0:
            return rows
        hessian, cross = torch.stack(self.hessians).sum(0), torch.stack(self.crosses).sum(0)
        return rows + change(rows, hessian, cross, strengths[best])

    def gain(self, rows: Tensor, damping: float) -> float:
        """Decrease of the squared output error on the half of the images outside the fit.

        Arguments as in ``retargeted``.
        """
        gain = 0.0
        for fitted, other in ((0, 1), (1, 0)):
            found = change(rows, self.hessians[fitted], self.crosses[fitted], damping)
            product = rows @ self.crosses[other]
            gain += float((found * (2 * product - found @ self.hessians[other])).sum())
        return gain


def change(rows: Tensor, hessian: Tensor, cross: Tensor, damping: float) -> Tensor:
    """Least-squares change of weight rows; shapes as in ``Target``."""
    lower = stable_cholesky(damped(hessian, damping))
    return torch.cholesky_solve((rows @ cross).transpose(1, 2), lower).transpose(1, 2)


def image_numbers(inputs: CallStore) -> list[int]:
    """Global number of the batch of images of each stored call."""
    return [global_number(i) for i, calls in enumerate(inputs.batches) for _ in range(calls)]
