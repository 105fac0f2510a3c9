# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Layers with quantized input and weight: their base class, and ``nn.Linear``."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quantizers import FakeQuantizer, PerChannel
from ..quantizers.functional import positive_scale
from .dispatch import compute
from .operation import Codes, Operand, Operation

if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object


class QuantizedLayer(Operation, _Base):
    """Mixin for a layer whose input and weight are fake-quantized: linear or a convolution.

    The float layer's class is swapped in place, so its keys stay and only
    ``input_quantizer.*`` and ``weight_quantizer.*`` are added.

    A per-channel input scale ``s`` is folded: ``W (s * q) = (W diag(s)) q``, and the
    weight quantizer quantizes ``W diag(s)``. The product then has integer codes on both
    sides and one real factor per output channel.
    """

    weight: Tensor
    bias: Any  # a tensor or None; torch's layers annotate it differently
    input_quantizer: FakeQuantizer
    weight_quantizer: FakeQuantizer

    weight_axis = 0
    """Axis of ``weight`` that holds the output channels."""

    channel_axis = -1
    """Axis of input and output that holds the channels: -1 for tokens, -3 for maps."""

    @property
    def takes_tokens(self) -> bool:
        """Whether the input is tokens ``(..., C)`` and the weight ``(out, C)``; else maps."""
        return self.channel_axis == -1

    def attach_quantizers(self, input_quantizer: FakeQuantizer, weight: FakeQuantizer) -> None:
        """Register the two quantizers (called once, by the conversion)."""
        self.input_quantizer = input_quantizer
        self.weight_quantizer = weight

    @property
    def quantizers(self) -> tuple[FakeQuantizer, FakeQuantizer]:
        """Quantizers of input and weight."""
        return self.input_quantizer, self.weight_quantizer

    def operands(self) -> dict[str, Operand]:
        """``input`` and ``weight``."""
        weight = Operand('weight', self.weight_quantizer, self.weight)
        return {'input': Operand('input', self.input_quantizer), 'weight': weight}

    def codes(self, *inputs: Tensor) -> dict[str, Codes]:
        """Codes of an input and of the folded weight."""
        weight = {'weight': Codes(*self.weight_quantizer.codes(self.folded_weight()))}
        if not inputs:
            return weight
        return {'input': Codes(*self.input_quantizer.codes(inputs[0])), **weight}

    def macs(self, inputs: Sequence[torch.Size], output: torch.Size) -> int:
        """As in the base class."""
        return output.numel() * self.product_depth()

    def reference(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``product`` of the quantized input and the effective weight; ``bias`` stays float.

        Args:
            x: Tokens ``(..., C)`` or maps ``(B, C, H, W)``, see ``takes_tokens``.
            bias: ``(out_channels,)``, or None.
        """
        return self.product(self.input_quantizer(x), self.effective_weight(), bias)

    @property
    def folds_input_scale(self) -> bool:
        """Whether the input scale differs between input channels."""
        return isinstance(self.input_quantizer.spec.granularity, PerChannel)

    def input_scale_on_weight(self) -> Tensor:
        """Per-channel input scale, shaped to broadcast over ``weight``."""
        raise NotImplementedError

    def folded_weight(self, weight: Tensor | None = None) -> Tensor:
        """``weight`` times the per-channel input scale: input of the weight quantizer.

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
        """Inverse of ``folded_weight``; same shape."""
        if not self.folds_input_scale:
            return folded
        return folded / self.input_scale_on_weight()

    def effective_weight(self) -> Tensor:
        """Weight in the layer's product: on the grid after stage 2."""
        if not self.weight_quantizer.is_active:
            return self.weight
        return self.unfolded_weight(self.weight_quantizer(self.folded_weight()))

    def output_scale(self, weight_scale: Tensor, input_scale: Tensor) -> Tensor:
        """Factor between the integer sum and the real output, shaped to broadcast over it.

        Args:
            weight_scale: Scale in a shape that broadcasts over the weight.
            input_scale: Scale in a shape that broadcasts over the input.
        """
        factor = weight_scale.reshape(-1)
        if not self.folds_input_scale:
            factor = factor * input_scale
        return self.over_channels(factor)

    def over_channels(self, values: Tensor) -> Tensor:
        """``(channels,)`` shaped to broadcast over the output."""
        return values.view(-1, *[1] * (-1 - self.channel_axis))

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The float layer's linear operation; shapes as in ``reference``."""
        raise NotImplementedError

    def product_gradients(
        self, grad: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of ``product`` without bias.

        Args:
            grad: Gradient of the output, same shape.
            x: Quantized input.
            weight: Weight that was multiplied.
            of_x: Whether to compute the gradient of ``x``.
            of_weight: Whether to compute the gradient of ``weight``.
        """
        raise NotImplementedError

    @property
    def can_pack(self) -> bool:
        """Whether ``product_gradients`` supports this layer's settings."""
        return True

    def product_depth(self) -> int:
        """Number of products summed for one output element."""
        raise NotImplementedError

    @property
    def is_matrix_product(self) -> bool:
        """Whether each output element is one row of weights times one column of inputs."""
        return True

    def to_matrix(self, weight: Tensor) -> Tensor:
        """``weight`` as ``(groups, rows, columns)``; a row is multiplied with an input column."""
        groups = getattr(self, 'groups', 1)
        return weight.reshape(groups, weight.shape[0] // groups, -1)

    def from_matrix(self, rows: Tensor) -> Tensor:
        """Inverse of ``to_matrix``: ``(groups, rows, columns)`` -> shape of the weight."""
        return rows.reshape(self.weight.shape)

    def input_columns(self, x: Tensor) -> Iterator[Tensor]:
        """Input as ``(groups, tokens, columns)``, in parts."""
        yield x.reshape(1, -1, x.shape[-1])


class QuantLinear(QuantizedLayer, nn.Linear):
    """``nn.Linear`` with fake-quantized operands; ``(..., in)`` -> ``(..., out)``.

    Made from a float layer by the conversion, see ``QuantizedLayer``.
    """

    kind = 'linear'

    def input_scale_on_weight(self) -> Tensor:
        """``(1, in_features)``."""
        return positive_scale(self.input_quantizer.scale).view(1, -1)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ weight.T + bias``: ``(..., in)`` -> ``(..., out)``."""
        return F.linear(x, weight, bias)

    def product_gradients(
        self, grad: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """``grad @ weight`` ``(..., in)`` and ``grad.T @ x`` ``(out, in)``."""
        rows = grad.flatten(0, -2) if grad.dim() > 1 else grad.unsqueeze(0)
        grad_x = (rows @ weight).view(x.shape) if of_x else None
        return grad_x, rows.t() @ x.reshape(-1, x.shape[-1]) if of_weight else None

    def product_depth(self) -> int:
        """``in_features``."""
        return self.in_features

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The layer with another bias ``(out,)``, for callers that assemble one (BEiT, Swin V2).

        It calls the module, so hooks on the layer run.
        """
        return self(x, bias)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``(..., in_features)`` -> ``(..., out_features)``; ``bias`` replaces the layer's."""
        return compute(self, x, self.bias if bias is None else bias)


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
    """Folded weight with one row per output channel, ``(out_channels, elements)``."""
    return layer.folded_weight(weight).movedim(layer.weight_axis, 0).flatten(1)


def linear_with_bias(layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """Output of a linear layer, quantized or float, with another bias than its own.

    Args:
        layer: ``nn.Linear``.
        x: ``(..., in_features)``.
        bias: ``(out_features,)``, or None.

    Returns:
        ``(..., out_features)``.
    """
    if isinstance(layer, QuantLinear):
        return layer.linear(x, bias)
    return F.linear(x, layer.weight, bias)


def biased_qkv(module: Any, x: Tensor) -> Tensor:
    """Projection of timm's attention whose bias has no part for the keys.

    Args:
        module: Has ``qkv``, ``q_bias`` or None, ``k_bias``, ``v_bias``, ``qkv_bias_separate``.
        x: ``(B, N, C)``.

    Returns:
        ``(B, N, 3 * C)``.
    """
    if module.q_bias is None:
        return module.qkv(x)
    bias = torch.cat((module.q_bias, module.k_bias, module.v_bias))
    if module.qkv_bias_separate:
        return module.qkv(x) + bias
    return linear_with_bias(module.qkv, x, bias)
