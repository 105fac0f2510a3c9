# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Float weights fitted to quantized inputs by least squares in closed form, before stage 1.

A layer has quantized inputs ``x^`` where the float model has ``x``. Inputs of a pretrained
model are correlated, rounding errors are not, so weights can average out much of the error:
``W' = argmin || W x - W' x^ ||^2``. It is the correction of QwT (arXiv 2411.13918, equation 6)
in the layer's own weight instead of a side branch, with GPTAQ's target (arXiv 2504.02692,
equation 5): the float model's output, so that errors of earlier layers are corrected too.
Images outside the fit decide on its damping, or that it is not used.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import QuantizedLayer
from ..stream.distributed import broadcast_from_0

DAMPINGS = (0.03, 0.1, 0.3, 1.0)
"""Candidates of the damping, added to the correlation matrix of the inputs."""
HELD_OUT = 4
"""Every n-th image is held out of the fit and used to choose the damping."""


@dataclass(frozen=True)
class Compensation:
    """Result of a fit, measured on held-out images.

    Attributes:
        damping: Chosen damping; None if the weights were not changed.
        error_before: Squared error of the output relative to its variance, with the original
            weights.
        error_after: The same with the fitted weights.
    """

    damping: float | None
    error_before: float
    error_after: float


@torch.no_grad()
def compensate(layer: QuantizedLayer, inputs: list[Tensor], floats: list[Tensor]) -> Compensation:
    """Fit a linear layer's weight and bias to its quantized inputs, in place.

    Args:
        layer: Layer with calibrated input quantizer and float weight.
        inputs: Its inputs in the model with quantized earlier layers, ``(tokens, C)`` for each
            image.
        floats: Its inputs in the float model for the same tokens.

    Returns:
        Errors before and after.
    """
    weight = layer.weight.detach().float()
    x = torch.cat([layer.input_quantizer(x) for x in inputs])
    f = torch.cat(floats)
    zero = x.new_zeros(x.shape[1])
    mean, mean_float = (x.mean(0), f.mean(0)) if layer.bias is not None else (zero, zero)
    x, missing = x - mean, (f - mean_float - (x - mean)) @ weight.t()  # error of the output
    variance = float(((f - mean_float) @ weight.t()).double().square().sum()) + 1e-12
    size = x.square().mean(0).sqrt().clamp_min(1e-8)
    x = x / size
    held = _held_out([len(i) for i in inputs], x.device)
    fit, test = _Equations(x[~held], missing[~held]), _Equations(x[held], missing[held])
    share = float(held.double().mean()) or 1.0
    before = test.error(None) / (variance * share)
    errors = {d: test.error(fit.solve(d)) / (variance * share) for d in DAMPINGS}
    best = min(errors, key=errors.__getitem__)
    if not errors[best] < before:
        return Compensation(None, before, before)
    change = broadcast_from_0((fit + test).solve(best) / size).to(weight.dtype)
    layer.weight.copy_(layer.weight + change)
    if layer.bias is not None:
        layer.bias.add_(weight @ mean_float - (weight + change) @ mean)
    return Compensation(best, before, errors[best])


def _held_out(tokens: list[int], device: torch.device) -> Tensor:
    """Mask of the held-out tokens, ``(tokens,)``."""
    held = [i % HELD_OUT == HELD_OUT - 1 for i in range(len(tokens))]
    counts = torch.tensor(tokens, device=device)
    return torch.tensor(held, device=device).repeat_interleave(counts)


class _Equations:
    """Normal equations of the least-squares fit of ``missing`` by ``x``.

    Args:
        x: Inputs, ``(tokens, C)``.
        missing: Correction that the outputs need, ``(tokens, out)``.
    """

    def __init__(self, x: Tensor, missing: Tensor) -> None:
        self.moments = (x.t() @ x).double()
        self.cross = (missing.t() @ x).double()
        self.energy = missing.double().square().sum()

    def __add__(self, other: '_Equations') -> '_Equations':
        total = copy.copy(self)
        total.moments = self.moments + other.moments
        total.cross = self.cross + other.cross
        total.energy = self.energy + other.energy
        return total

    def solve(self, damping: float) -> Tensor:
        """The solution, ``(out, C)``, float64."""
        moments = self.moments.clone()
        moments.diagonal().add_(damping * self.moments.diagonal().mean().clamp_min(1e-12))
        lower = torch.linalg.cholesky(moments)
        return torch.cholesky_solve(self.cross.t(), lower).t()

    def error(self, change: Tensor | None) -> float:
        """Squared error with a solution; None for no change of the weights."""
        if change is None:
            return float(self.energy)
        quadratic = ((change @ self.moments) * change).sum()
        return float(self.energy - 2 * (change * self.cross).sum() + quadratic)
