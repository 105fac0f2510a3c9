# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""QuantConv2d and QuantConvTranspose2d."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..compat.torch import convolution_backward, convolve, output_padding
from ..quantizers.functional import positive_scale
from .layer import QuantizedLayer


class QuantConv2d(QuantizedLayer, nn.Conv2d):
    """``nn.Conv2d`` with fake-quantized operands, ``(B, C, H, W)`` in and out."""

    channel_axis = -3

    def input_scale_on_weight(self) -> Tensor:
        """``(out, in / groups, 1, 1)``: each output channel's own input channels."""
        scale = positive_scale(self.input_quantizer.scale).view(self.groups, 1, -1)
        scale = scale.expand(-1, self.out_channels // self.groups, -1)
        return scale.reshape(self.out_channels, -1, 1, 1)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution; padding zeros are code 0."""
        return convolve(self, x, weight, bias)

    @property
    def can_pack(self) -> bool:
        """Not with padding other than a number of zeros (``same``, ``reflect``, ...)."""
        return self.padding_mode == 'zeros' and not isinstance(self.padding, str)

    def product_gradients(
        self, grad: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """As in the base class."""
        return convolution_backward(self, grad, x, weight, (of_x, of_weight), [0, 0])

    def product_depth(self) -> int:
        """Elements of one output channel's kernel."""
        return self.weight[0].numel()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C_in, H, W)`` -> ``(B, C_out, H', W')``."""
        return self.quantized_product(x, self.bias)


class QuantConvTranspose2d(QuantizedLayer, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with fake-quantized operands.

    Its weight is ``(in, out / groups, kH, kW)``: groups share the output scales.
    """

    weight_axis = 1
    channel_axis = -3
    _output_size: list[int] | None = None

    def input_scale_on_weight(self) -> Tensor:
        """``(in, 1, 1, 1)``."""
        return positive_scale(self.input_quantizer.scale).view(-1, 1, 1, 1)

    def output_scale(self, weight_scale: Tensor, input_scale: Tensor) -> Tensor:
        """As in the base class; the weight's scales repeat for every group."""
        if weight_scale.dim():
            weight_scale = weight_scale.reshape(-1).repeat(self.groups)
        return super().output_scale(weight_scale, input_scale)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The transposed convolution."""
        return F.conv_transpose2d(
            x,
            weight,
            bias,
            self.stride,
            self.padding,  # type: ignore[arg-type]
            output_padding(self, x, self._output_size),
            self.groups,
            self.dilation,
        )

    def product_gradients(
        self, grad: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """As in the base class; ``output_size`` is read off ``grad``."""
        behind = [
            size - ((n - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1)
            for size, n, stride, padding, dilation, kernel in zip(
                grad.shape[-2:],
                x.shape[-2:],
                self.stride,
                self.padding,
                self.dilation,
                self.kernel_size,
                strict=True,
            )
        ]
        return convolution_backward(self, grad, x, weight, (of_x, of_weight), behind)

    def product_depth(self) -> int:
        """Upper bound: all input channels of a group times the kernel."""
        return self.in_channels // self.groups * self.weight[0, 0].numel()

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """``(B, C_in, H, W)`` -> ``(B, C_out, H', W')``."""
        self._output_size = output_size
        return self.quantized_product(x, self.bias)
