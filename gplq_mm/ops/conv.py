# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""QuantConv2d and QuantConvTranspose2d."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compat.torch import convolution_backward, convolve, output_padding, padding_of_input
from ..quantizers.functional import positive_scale
from .dispatch import compute
from .linear import QuantizedLayer

_STRIP = 1 << 23
"""Most elements of an unfolded input in memory at once."""


def by_group(tokens: Tensor, groups: int) -> Tensor:
    """``(tokens, columns)`` -> ``(groups, tokens, columns / groups)``."""
    return tokens.unflatten(1, (groups, -1)).transpose(0, 1)


class QuantConv2d(QuantizedLayer, nn.Conv2d):
    """``nn.Conv2d`` with fake-quantized operands, ``(B, C, H, W)`` in and out."""

    kind = 'conv'
    channel_axis = -3

    def input_scale_on_weight(self) -> Tensor:
        """``(out, in / groups, 1, 1)``: scales of the input channels of each output channel."""
        scale = positive_scale(self.input_quantizer.scale).view(self.groups, 1, -1)
        scale = scale.expand(-1, self.out_channels // self.groups, -1)
        return scale.reshape(self.out_channels, -1, 1, 1)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution, ``(B, C, H, W)`` -> ``(B, out, h, w)``; zero padding has code 0."""
        return convolve(self, x, weight, bias)

    @property
    def can_pack(self) -> bool:
        """True for zero padding given as numbers, not for ``same``, ``reflect``, ..."""
        return self.padding_mode == 'zeros' and not isinstance(self.padding, str)

    def product_gradients(
        self, grad: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """As in the base class."""
        return convolution_backward(self, grad, x, weight, (of_x, of_weight), [0, 0])

    def product_depth(self) -> int:
        """Elements of the kernel of one output channel."""
        return self.weight[0].numel()

    def input_columns(self, x: Tensor) -> Iterator[Tensor]:
        """Unfolded input ``(groups, pixels, columns)`` in strips of output rows, to stay small."""
        x = x[None] if x.dim() == 3 else x
        mode = 'constant' if self.padding_mode == 'zeros' else self.padding_mode
        x = F.pad(x, padding_of_input(self), mode=mode)
        (kh, kw), (sh, sw), (dh, dw) = self.kernel_size, self.stride, self.dilation
        height = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
        width = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
        strip = max(1, _STRIP // max(len(x) * x.shape[1] * kh * kw * width, 1))
        for top in range(0, height, strip):
            count = min(strip, height - top)
            parts = [
                x[
                    :,
                    :,
                    i * dh + top * sh : i * dh + (top + count - 1) * sh + 1 : sh,
                    j * dw : j * dw + (width - 1) * sw + 1 : sw,
                ]
                for i in range(kh)
                for j in range(kw)
            ]
            cols = torch.stack(parts, 2).flatten(1, 2)  # (B, C * kH * kW, count, width)
            yield by_group(cols.permute(0, 2, 3, 1).flatten(0, 2), self.groups)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C_in, H, W)`` -> ``(B, C_out, H', W')``."""
        return compute(self, x, self.bias)


class QuantConvTranspose2d(QuantizedLayer, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with fake-quantized operands.

    Its weight is ``(in, out / groups, kH, kW)``: groups share the output scales.
    """

    kind = 'conv'
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
        """The transposed convolution, ``(B, C, H, W)`` -> ``(B, out, h, w)``."""
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
        """As in the base class; the output size is that of ``grad``."""
        output_pad = [
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
        return convolution_backward(self, grad, x, weight, (of_x, of_weight), output_pad)

    @property
    def is_matrix_product(self) -> bool:
        """False where kernels overlap in the output."""
        return (
            tuple(self.stride) == tuple(self.kernel_size)
            and set(self.padding) == {0}
            and set(self.dilation) == {1}
        )

    def to_matrix(self, weight: Tensor) -> Tensor:
        """As in the base class."""
        rows = weight.reshape(self.groups, weight.shape[0] // self.groups, -1)
        return rows.transpose(1, 2)

    def from_matrix(self, rows: Tensor) -> Tensor:
        """As in the base class."""
        return rows.transpose(1, 2).reshape(self.weight.shape)

    def input_columns(self, x: Tensor) -> Iterator[Tensor]:
        """Pixels ``(groups, pixels, columns)``; each meets each element of the kernel once."""
        yield by_group(x.flatten(2).transpose(1, 2).flatten(0, 1), self.groups)

    def macs(self, inputs: Sequence[torch.Size], output: torch.Size) -> int:
        """Every input element is multiplied with one kernel per output channel of its group."""
        return inputs[0].numel() * self.weight[0].numel()

    def product_depth(self) -> int:
        """Upper bound: all input channels of a group times the kernel."""
        return self.in_channels // self.groups * self.weight[0, 0].numel()

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """``(B, C_in, H, W)`` -> ``(B, C_out, H', W')``."""
        self._output_size = output_size
        return compute(self, x, self.bias)
