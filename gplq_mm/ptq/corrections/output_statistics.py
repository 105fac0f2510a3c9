# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Statistics of a layer's output in the quantized and in the stage-1 model."""

from typing import Any

import torch
from torch import Tensor

from ...stream import CallStore, Reached, Unit
from ...stream.exact_sum import ExactSum
from ...stream.interception import run_until_reached
from ...stream.unit_stream import run_unit
from ..task import PTQTask


class OutputMoments:
    """Sums over all tokens of each output channel, bit-equal for every split over ranks.

    Attributes:
        count: Tokens.
        output: Sum of the quantized model's output, ``(channels,)``.
        target: Sum of the stage-1 output.
        output_squared: Sum of squares of the quantized model's output.
        product: Sum of the products of the two.
    """

    count: Tensor
    output: Tensor
    target: Tensor
    output_squared: Tensor
    product: Tensor

    def __init__(
        self,
        task: PTQTask,
        unit: Unit,
        name: str,
        inputs: CallStore,
        reference: CallStore | None,
    ) -> None:
        layer = unit.layers[name]
        channels = int(getattr(layer, 'out_features', 0) or getattr(layer, 'out_channels', 0))
        total = ExactSum((5, channels), layer.weight.device)
        for index in range(len(inputs)):
            outputs = _outputs(unit, name, inputs, index)
            with task.stage1():
                targets = _outputs(unit, name, inputs if reference is None else reference, index)
            for y, target in zip(outputs, targets, strict=True):
                total.add(_sums(y, target, layer.channel_axis))
        total.reduce()
        self.count, self.output, self.target, self.output_squared, self.product = total.value()


def _sums(y: Tensor, target: Tensor, axis: int) -> Tensor:
    """The five sums of one call, ``(5, channels)``, float64."""
    y, target = (t.double().movedim(axis, 0).flatten(1) for t in (y, target))
    ones = torch.full((len(y),), float(y.shape[1]), dtype=torch.float64, device=y.device)
    return torch.stack([ones, y.sum(1), target.sum(1), y.square().sum(1), (y * target).sum(1)])


def _outputs(unit: Unit, name: str, inputs: CallStore, index: int) -> list[Tensor]:
    """Outputs of a layer in one call of its unit, one tensor per call of the layer.

    A bias passed by the caller (BEiT, Swin V2) is subtracted: no algorithm can change it.
    """
    layer, caught, call = unit.layers[name], list[Tensor](), inputs[index]

    def hook(_: Any, args: tuple[Any, ...], output: Tensor) -> None:
        caught.append(output if len(args) < 2 or args[1] is None else output - args[1])
        if len(caught) == unit.calls[name]:
            raise Reached

    handle = layer.register_forward_hook(hook)
    try:
        run_until_reached(lambda: run_unit(unit.module, call, layer.weight.device))
    finally:
        handle.remove()
    return caught
