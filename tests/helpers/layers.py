# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Small quantized layers for the tests, made by hand (without the conversion)."""

from typing import Any

import torch
from torch import Tensor, nn

from gplq_mm.ops import QuantConv2d, QuantConvTranspose2d, QuantLinear, swap_class
from gplq_mm.quantizers import FakeQuantizer, PerChannel, PerTensor, QuantSpec
from tests.helpers.reference import calibrated

QUANTIZED = {
    nn.Linear: QuantLinear,
    nn.Conv2d: QuantConv2d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
}


def quantized(
    layer: nn.Module,
    x: Tensor,
    bits: tuple[int, int] = (4, 4),
    scheme: tuple[bool, bool] = (True, False),
    per_channel_input: bool = False,
    per_channel_weight: bool = True,
    learn: bool = False,
) -> Any:
    """`layer` with its class swapped and both quantizers calibrated on `x`.

    Args:
        layer: A float Linear, Conv2d or ConvTranspose2d; changed in place.
        x: Input that sets the ranges.
        bits: Bits of weight and activation.
        scheme: `(signed, symmetric)` of the activation.
        per_channel_input: One input scale a channel, folded into the weight.
        per_channel_weight: One weight scale an output channel.
        learn: Whether the activation's scale is a parameter.
    """
    cls = QUANTIZED[type(layer)]
    axis = cls.channel_axis
    granularity = PerChannel(axis) if per_channel_input else PerTensor()
    size = x.shape[axis] if per_channel_input else None
    spec = QuantSpec(bits[1], *scheme, granularity=granularity, learn_scale=learn)
    weight_axis = PerChannel(cls.weight_axis) if per_channel_weight else PerTensor()
    weight = FakeQuantizer(
        QuantSpec(bits[0], granularity=weight_axis),
        layer.weight.shape[cls.weight_axis] if per_channel_weight else None,
        'weight',
    )
    swap_class(layer, cls)
    layer.attach_quantizers(calibrated(FakeQuantizer(spec, size), x), weight)
    with torch.no_grad():
        calibrated(weight, layer.folded_weight())
    return layer


def set_enabled(layer: nn.Module, enabled: bool) -> None:
    """Switch all quantizers below a module on or off."""
    for module in layer.modules():
        if isinstance(module, FakeQuantizer):
            module.enabled = enabled


def step(layer: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Output, input gradients and parameter gradients of one forward and backward pass."""
    inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
    layer.zero_grad()
    out = layer(*inputs)
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    grads = [p.grad for n, p in layer.named_parameters() if '_quantizer' not in n]
    return [out.detach(), *(x.grad for x in inputs), *grads]
