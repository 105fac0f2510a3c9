# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Steps of scales, biases and gains in proportion to themselves.

Adam's step is about the learning rate, whatever the parameter: 1e-3 is nothing to a scale of 10
and twice a scale of 5e-4. Here a learning rate of 1e-3 moves every scale by about a thousandth:
the step is one of ``log(scale)``. Biases and gains (normalization, LayerScale) may be negative or
0, so their step is multiplied by their size. The parameters, and what a checkpoint stores, stay
the same; sizes are those before each step, so that a resumed run goes on bit for bit.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


class RelativeSteps:
    """Makes an optimizer step in the logarithm of some of its parameters.

    Before a step their gradients become those of the logarithm and the parameters 0, so that
    the step itself is what is left of them; after it they are the old values times its
    exponential. Momentum, gradient scaling and schedules are the optimizer's own. A weight decay
    of these parameters has no effect.

    Args:
        optimizer: Any torch optimizer.
        parameters: Positive ones.

    Examples:
        >>> scales = [nn.Parameter(torch.tensor(s)) for s in (1e-4, 10.0)]
        >>> optimizer = torch.optim.SGD(scales, lr=0.1)
        >>> steps = RelativeSteps(optimizer, scales)
        >>> sum(s.log() for s in scales).backward()
        >>> optimizer.step()
        >>> [round(float(s), 7) for s in scales]  # both times exp(-0.1)
        [9.05e-05, 9.0483742]
    """

    def __init__(self, optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self._before: list[torch.Tensor] = []
        optimizer.register_step_pre_hook(self._start)
        optimizer.register_step_post_hook(self._finish)

    @torch.no_grad()
    def _start(self, *_: Any) -> None:
        self._before = [p.detach().clone() for p in self.parameters]
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(parameter)
            parameter.zero_()

    @torch.no_grad()
    def _finish(self, *_: Any) -> None:
        for parameter, before in zip(self.parameters, self._before, strict=True):
            parameter.copy_(before * parameter.exp())
        self._before = []


ZERO_BIAS = 1e-2
"""Size of biases that are all (about) 0; trained ones are larger."""


class ProportionalSteps:
    """Makes an optimizer's steps of some parameters proportional to their size.

    It is as if ``parameter / size`` were what the optimizer holds: gradients are multiplied by the
    size before the step, the step after it. Momentum, gradient scaling and schedules are the
    optimizer's own. The parameters' group must have no weight decay.

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
        >>> [round(float(g), 4) for g in gain]  # each by a hundredth of itself
        [9.9, -0.101]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        biases: Iterable[nn.Parameter],
        gains: Iterable[nn.Parameter],
    ) -> None:
        self._of_bias = [(p, True) for p in biases] + [(p, False) for p in gains]
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []
        optimizer.register_step_pre_hook(self._start)
        optimizer.register_step_post_hook(self._finish)

    @torch.no_grad()
    def _start(self, *_: Any) -> None:
        self._before = []
        for parameter, is_bias in self._of_bias:
            size = _rms(parameter) if is_bias else parameter.abs()
            self._before.append((parameter.detach().clone(), size))
            if parameter.grad is not None:
                parameter.grad.mul_(size)
            parameter.zero_()  # what the optimizer leaves is the step, not rounded to the parameter

    @torch.no_grad()
    def _finish(self, *_: Any) -> None:
        parameters = [parameter for parameter, _ in self._of_bias]
        for parameter, (before, size) in zip(parameters, self._before, strict=True):
            parameter.copy_(before + parameter * size)
        self._before = []


def _rms(bias: torch.Tensor) -> torch.Tensor:
    return bias.float().square().mean().sqrt().clamp_min(ZERO_BIAS).to(bias.dtype)
