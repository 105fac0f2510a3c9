# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""mmcv: its own Linear and convolution classes, FFN, and the attention wrapper."""

from importlib.util import find_spec
from typing import Any

from mmcv.cnn.bricks import wrappers
from mmcv.cnn.bricks.transformer import FFN, MultiheadAttention
from mmengine.model import Sequential

from .....convert import (
    Context,
    child_name,
    register_handler,
    register_layer,
    register_roles,
    set_ffn_roles,
)
from .....ops import QuantConv2d, QuantConvTranspose2d, QuantLinear, swap_class
from .....ops.feed_forward import SequentialFeedForward


class QuantFFNLayers(SequentialFeedForward, Sequential):
    """``FFN.layers`` as one operator, if the engine fuses it."""


class QuantMMCVLinear(QuantLinear, wrappers.Linear):
    """``mmcv.cnn.Linear`` with fake-quantized operands."""


class QuantMMCVConv2d(QuantConv2d, wrappers.Conv2d):
    """``mmcv.cnn.Conv2d`` with fake-quantized operands."""


class QuantMMCVConvTranspose2d(QuantConvTranspose2d, wrappers.ConvTranspose2d):
    """``mmcv.cnn.ConvTranspose2d`` with fake-quantized operands."""


register_layer(wrappers.Linear, QuantMMCVLinear)
register_layer(wrappers.Conv2d, QuantMMCVConv2d)
register_layer(wrappers.ConvTranspose2d, QuantMMCVConvTranspose2d)


@register_handler(MultiheadAttention)
def pass_through(module: Any, name: str, context: Context) -> None:
    """The wrapper has no matrix product of its own: its child ``attn`` is torch's attention."""


@register_roles(FFN)
def give_ffn_roles(module: Any, name: str, context: Context) -> None:
    """Set ``post_gelu`` or ``post_relu`` after the FFN's activation function."""
    set_ffn_roles(module.layers, child_name(name, 'layers'), context)


@register_handler(FFN)
def convert_ffn(module: Any, name: str, context: Context) -> None:
    """The layers are children; their container may run them as one operator."""
    swap_class(module.layers, QuantFFNLayers)


if find_spec('mmcv._ext') is not None:  # mmcv-lite has no operators
    from mmcv.ops import MultiScaleDeformableAttention

    @register_handler(MultiScaleDeformableAttention)
    def keep_sampling_float(module: Any, name: str, context: Context) -> None:
        """The four Linear children are quantized, the sampling operator is not."""
        context.skip(child_name(name, 'sampling'), 'deformable sampling is no matrix product')
