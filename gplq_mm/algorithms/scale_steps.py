# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Steps of learned scales in proportion to the scales themselves.

Adam's step is about the learning rate, whatever the parameter: 1e-3 is nothing to a scale of 10
and twice a scale of 5e-4. Here an optimizer's step is one of ``log(scale)``: a learning rate of
1e-3 moves every scale by about a thousandth. The parameter, and what a checkpoint stores, stays
the scale.
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
