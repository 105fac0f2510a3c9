# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Optimizer steps of scales, biases and gains proportional to their size.

Adam's step is about as large as the learning rate: 1e-3 is negligible for a scale of 10 and
twice a scale of 5e-4. Here a learning rate of 1e-3 changes every scale by about a thousandth:
the step is taken in ``log(scale)``. Biases and gains (normalization, LayerScale) may be negative
or 0, so their step is multiplied by their size. Parameters and checkpoints have the same form as
without it. Sizes are those before each step, so that a resumed run is equal bit for bit.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

ZERO_BIAS = 1e-2
"""Smallest size of biases, for biases that are all about 0."""


class OwnSteps:
    """Base class: an optimizer steps some parameters as if they were divided by their size.

    Before a step, gradients are multiplied by the size and the parameters are set to 0, so that
    the optimizer computes the step itself, without rounding to the parameter; after it ``moved``
    applies the step. Momentum, gradient scaling and schedules are those of the optimizer.

    Args:
        optimizer: Any torch optimizer.
        parameters: The parameters to step this way.
    """

    def __init__(self, optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self._before: list[tuple[Tensor, Tensor]] = []
        optimizer.register_step_pre_hook(self._start)
        optimizer.register_step_post_hook(self._finish)

    def size(self, parameter: nn.Parameter) -> Tensor:
        """Size of a parameter, broadcastable over it."""
        raise NotImplementedError

    def moved(self, before: Tensor, size: Tensor, step: Tensor) -> Tensor:
        """The parameter after a step; all tensors have its shape.

        Args:
            before: Its value before the step.
            size: Its size before the step.
            step: Step of the optimizer.
        """
        raise NotImplementedError

    @torch.no_grad()
    def _start(self, *_: Any) -> None:
        self._before = []
        for parameter in self.parameters:
            before, size = parameter.detach().clone(), self.size(parameter).clone()
            self._before.append((before, size))
            if parameter.grad is not None:
                parameter.grad.mul_(size)
            parameter.zero_()

    @torch.no_grad()
    def _finish(self, *_: Any) -> None:
        for parameter, (before, size) in zip(self.parameters, self._before, strict=True):
            parameter.copy_(self.moved(before, size, parameter))
        self._before = []


class RelativeSteps(OwnSteps):
    """Makes an optimizer step in the logarithm of some positive parameters.

    Weight decay of these parameters has no effect.

    Examples:
        >>> scales = [nn.Parameter(torch.tensor(s)) for s in (1e-4, 10.0)]
        >>> optimizer = torch.optim.SGD(scales, lr=0.1)
        >>> steps = RelativeSteps(optimizer, scales)
        >>> sum(s.log() for s in scales).backward()
        >>> optimizer.step()
        >>> [round(float(s), 7) for s in scales]  # both multiplied by exp(-0.1)
        [9.05e-05, 9.0483742]
    """

    def size(self, parameter: nn.Parameter) -> Tensor:
        """The parameter itself: the gradient becomes the one of its logarithm."""
        return parameter

    def moved(self, before: Tensor, size: Tensor, step: Tensor) -> Tensor:
        """The old value times the exponential of the step; all have the parameter's shape."""
        return before * step.exp()


class ProportionalSteps(OwnSteps):
    """Makes the steps of some parameters proportional to their size.

    The groups of these parameters must have no weight decay.

    Args:
        optimizer: Any torch optimizer.
        biases: Their size is their root mean square, at least ``ZERO_BIAS``.
        gains: The size of each element is its absolute value.

    Examples:
        >>> gain = nn.Parameter(torch.tensor([10.0, -0.1]))
        >>> optimizer = torch.optim.Adam([gain], lr=0.01)
        >>> steps = ProportionalSteps(optimizer, [], [gain])
        >>> gain.sum().backward()
        >>> optimizer.step()
        >>> [round(float(g), 4) for g in gain]  # each changes by one percent
        [9.9, -0.101]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        biases: Iterable[nn.Parameter],
        gains: Iterable[nn.Parameter],
    ) -> None:
        gains = list(gains)
        self._gain_ids = {id(p) for p in gains}
        super().__init__(optimizer, [*biases, *gains])

    def size(self, parameter: nn.Parameter) -> Tensor:
        """As the class says."""
        if id(parameter) in self._gain_ids:
            return parameter.abs()
        rms = parameter.float().square().mean().sqrt()
        return rms.clamp_min(ZERO_BIAS).to(parameter.dtype)

    def moved(self, before: Tensor, size: Tensor, step: Tensor) -> Tensor:
        """The old value plus the step times the size; all have the parameter's shape."""
        return before + step * size
