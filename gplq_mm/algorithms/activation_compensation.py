# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Float weights fitted to quantized inputs: least squares, in closed form, before stage 1.

A layer gets quantized inputs ``x^`` where the float model's gets ``x``. Inputs of a pretrained
model are correlated, errors of rounding are not, so that weights can average much of the error
out: ``W' = argmin || W x - W' x^ ||^2``. The correction is the one of QwT (arXiv 2411.13918,
equation 6) inside the layer itself, so no side branch is left, with GPTAQ's target
(arXiv 2504.02692, equation 5): the float model's output, errors of the layers before included.
How far it is damped, or whether it is left out, is decided on images that it was not fitted to.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..modules import QuantLinear
from .distributed import broadcast_from_0

DAMPINGS = (0.003, 0.01, 0.03, 0.1)
"""Added to the inputs' correlation matrix."""
HELD_OUT = 4
"""Each so-manieth image decides on the damping."""


@dataclass(frozen=True)
class Compensation:
    """What a fit was worth, on images that it was not fitted to.

    Attributes:
        damping: Chosen; None where the weights were left as they are.
        error_before: Squared error of the output relative to its variance, weights as they were.
        error_after: With the fitted weights.
    """

    damping: float | None
    error_before: float
    error_after: float


@torch.no_grad()
def compensate(layer: QuantLinear, inputs: list[Tensor], floats: list[Tensor]) -> Compensation:
    """Fit a linear layer's weight and bias to its quantized inputs, in place.

    Args:
        layer: Its input quantizer is calibrated, its weight float.
        inputs: Its inputs in the model whose layers before are quantized, ``(tokens, C)`` for each
            image.
        floats: Its inputs in the float model for the same tokens.

    Returns:
        What the fit was worth.
    """
    weight = layer.weight.detach().float()
    quantized = [layer.input_quantizer(x) for x in inputs]
    fit = [i for i in range(len(inputs)) if i % HELD_OUT != HELD_OUT - 1]
    held = [i for i in range(len(inputs)) if i % HELD_OUT == HELD_OUT - 1] or fit
    centred = layer.bias is not None
    system = _System(weight, [quantized[i] for i in fit], [floats[i] for i in fit], centred)
    test = _System(weight, [quantized[i] for i in held], [floats[i] for i in held], centred)
    before = test.error(torch.zeros_like(weight))
    errors = {damping: test.error(system.solve(damping)) for damping in DAMPINGS}
    best = min(errors, key=errors.__getitem__)
    if not errors[best] < before:
        return Compensation(None, before, before)
    whole = _System(weight, quantized, floats, centred)
    change = broadcast_from_0(whole.solve(best))
    layer.weight.copy_(layer.weight + change)
    if layer.bias is not None:
        layer.bias.add_(weight @ whole.mean_float - (weight + change) @ whole.mean)
    return Compensation(best, before, errors[best])


class _System:
    """Normal equations of a layer on some images.

    Args:
        weight: Float weight, ``(out, C)``.
        quantized: Quantized inputs.
        floats: Inputs of the float model.
        centred: Whether a bias takes up the means.
    """

    def __init__(
        self, weight: Tensor, quantized: list[Tensor], floats: list[Tensor], centred: bool
    ) -> None:
        self.weight = weight
        x, f = torch.cat(quantized), torch.cat(floats)
        zero = x.new_zeros(x.shape[1])
        self.mean = x.mean(0) if centred else zero
        self.mean_float = f.mean(0) if centred else zero
        x, f = x - self.mean, f - self.mean_float
        self.size = x.square().mean(0).sqrt().clamp_min(1e-8)
        x = x / self.size
        self.variance = float((f @ weight.t()).double().square().sum()) + 1e-12
        missing = (f - x * self.size) @ weight.t()  # what the output lacks
        self.energy = float(missing.double().square().sum())
        self.moments = (x.t() @ x).double()
        self.cross = (missing.t() @ x).double()

    def solve(self, damping: float) -> Tensor:
        """Change of the weight."""
        moments = self.moments.clone()
        moments.diagonal().add_(damping * self.moments.diagonal().mean())
        lower = torch.linalg.cholesky(moments)
        change = torch.cholesky_solve(self.cross.t(), lower).t()
        return (change / self.size).to(self.weight.dtype)

    def error(self, change: Tensor) -> float:
        """Squared error relative to the output's variance."""
        change = change.double() * self.size
        explained = 2 * (change * self.cross).sum()
        quadratic = ((change @ self.moments) * change).sum()
        return float((self.energy - explained + quadratic) / self.variance)
