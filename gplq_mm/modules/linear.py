# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""QuantLinear: ``nn.Linear`` with a quantized input and weight."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quantizers.functional import positive_scale
from .layer import QuantizedLayer


class QuantLinear(QuantizedLayer, nn.Linear):
    """``nn.Linear`` with fake-quantized operands; ``(..., in)`` -> ``(..., out)``.

    Made from a float layer by the conversion, see ``QuantizedLayer``.
    """

    def input_scale_on_weight(self) -> Tensor:
        """``(1, in_features)``."""
        return positive_scale(self.input_quantizer.scale).view(1, -1)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ weight.T + bias``."""
        return F.linear(x, weight, bias)

    def product_gradients(
        self, grad: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """``grad @ weight`` and ``grad.T @ x``."""
        rows = grad.flatten(0, -2) if grad.dim() > 1 else grad.unsqueeze(0)
        grad_x = (rows @ weight).view(x.shape) if of_x else None
        return grad_x, rows.t() @ x.reshape(-1, x.shape[-1]) if of_weight else None

    def product_depth(self) -> int:
        """``in_features``."""
        return self.in_features

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The layer with another bias, for callers that assemble it (BEiT, Swin V2).

        It goes through ``forward``, so hooks on the layer see it.
        """
        return self(x, bias)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``(..., in_features)`` -> ``(..., out_features)``; ``bias`` replaces the layer's."""
        return self.quantized_product(x, self.bias if bias is None else bias)


def linear_with_bias(layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer, quantized or float, with another bias than its own.

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
