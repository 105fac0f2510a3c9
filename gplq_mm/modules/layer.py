# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""What all quantized layers with a weight share."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..quantizers import FakeQuantizer, PerChannel
from .engine import EngineUser, needs_graph, packs
from .exact import accumulator_dtype, exact_total, use_codes
from .fused_layer import LinearOperation, packed_product

if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object


class QuantizedLayer(EngineUser, _Base):
    """Mixin for a layer whose input and weight are fake-quantized.

    The float layer's class is swapped in place, so its keys stay and only
    ``input_quantizer.*`` and ``weight_quantizer.*`` are added.

    A per-channel input scale ``s`` is folded: ``W (s * q) = (W diag(s)) q``, and the
    weight quantizer sees ``W diag(s)``. The product then has integer codes on both
    sides and one real factor an output channel.
    """

    weight: Tensor
    bias: Any  # a tensor or None; torch's own layers annotate it differently
    input_quantizer: FakeQuantizer
    weight_quantizer: FakeQuantizer

    weight_axis = 0
    """Axis of ``weight`` that holds the output channels."""

    channel_axis = -1
    """Axis of input and output that holds the channels: -1 for tokens, -3 for maps."""

    def attach_quantizers(self, input_quantizer: FakeQuantizer, weight: FakeQuantizer) -> None:
        """Register the two quantizers (called once, by the conversion)."""
        self.input_quantizer = input_quantizer
        self.weight_quantizer = weight

    @property
    def folds_input_scale(self) -> bool:
        """Whether the input scale differs between input channels."""
        return isinstance(self.input_quantizer.spec.granularity, PerChannel)

    def input_scale_on_weight(self) -> Tensor:
        """Per-channel input scale, shaped to broadcast over ``weight``."""
        raise NotImplementedError

    def folded_weight(self, weight: Tensor | None = None) -> Tensor:
        """``weight`` times the per-channel input scale: what the weight quantizer sees.

        Args:
            weight: Values to fold; the layer's own if None.

        Returns:
            Same shape as ``weight``; the weight itself for a per-tensor input scale.
        """
        weight = self.weight if weight is None else weight
        if not self.folds_input_scale:
            return weight
        return weight * self.input_scale_on_weight()

    def unfolded_weight(self, folded: Tensor) -> Tensor:
        """Inverse of ``folded_weight``."""
        if not self.folds_input_scale:
            return folded
        return folded / self.input_scale_on_weight()

    def effective_weight(self) -> Tensor:
        """Weight as the layer multiplies it: on the grid once stage 2 has run."""
        if not self.weight_quantizer.is_active:
            return self.weight
        return self.unfolded_weight(self.weight_quantizer(self.folded_weight()))

    def output_scale(self, weight_scale: Tensor, input_scale: Tensor) -> Tensor:
        """Factor from the integer sum to the real output, shaped to broadcast over it.

        Args:
            weight_scale: Scale as it broadcasts over the weight.
            input_scale: Scale as it broadcasts over the input.
        """
        factor = weight_scale.reshape(-1)
        if not self.folds_input_scale:
            factor = factor * input_scale
        return self._over_channels(factor)

    def _over_channels(self, values: Tensor) -> Tensor:
        """``(channels,)`` shaped to broadcast over the output."""
        return values.view(-1, *[1] * (-1 - self.channel_axis))

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The float layer's linear operation."""
        raise NotImplementedError

    def product_gradients(
        self, grad: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of ``product`` without bias.

        Args:
            grad: Gradient of the output.
            x: Quantized input.
            weight: Weight that was multiplied.
            of_x: Whether the gradient of ``x`` is wanted.
            of_weight: Whether the gradient of ``weight`` is wanted.
        """
        raise NotImplementedError

    @property
    def can_pack(self) -> bool:
        """Whether ``product_gradients`` holds for this layer's settings."""
        return True

    def product_depth(self) -> int:
        """Number of products summed for one output element."""
        raise NotImplementedError

    def _packs(self, x: Tensor, bias: Tensor | None) -> bool:
        quantizer = self.input_quantizer
        if not (packs(self.engine, quantizer) and self.can_pack):
            return False
        return needs_graph(x, quantizer.scale, self.weight, bias)

    def quantized_product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The linear operation with quantized operands.

        Args:
            x: Layer input.
            bias: Added to the output in float, or None.
        """
        if self._packs(x, bias):
            operation = LinearOperation(self.product, self.product_gradients, self.channel_axis)
            weight = self.effective_weight()
            return packed_product(operation, self.input_quantizer, x, weight, bias)
        if not use_codes(x, self.input_quantizer, self.weight_quantizer):
            return self.product(self.input_quantizer(x), self.effective_weight(), bias)
        codes, input_scale = self.input_quantizer.codes(x)
        weight_codes, weight_scale = self.weight_quantizer.codes(self.folded_weight())
        dtype = accumulator_dtype(self.input_quantizer, self.weight_quantizer, self.product_depth())
        total = self.product(codes.to(dtype), weight_codes.to(dtype), None)
        total = exact_total(total, codes.dtype)
        out = total * self.output_scale(weight_scale, input_scale)
        if bias is not None:
            out = out + self._over_channels(bias)
        return out.to(x.dtype)


def swap_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give ``module`` the class ``cls``, which must extend its present one.

    Raises:
        TypeError: If ``cls`` is not a subclass of the module's class.
    """
    if not issubclass(cls, type(module)):
        raise TypeError(f'{cls.__name__} does not extend {type(module).__name__}')
    module.__class__ = cls


@torch.no_grad()
def weight_rows(layer: QuantizedLayer, weight: Tensor | None = None) -> Tensor:
    """Folded weight with one row an output channel, ``(out_channels, elements)``."""
    return layer.folded_weight(weight).movedim(layer.weight_axis, 0).flatten(1)
