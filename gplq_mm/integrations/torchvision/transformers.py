# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""torchvision: Swin and Swin V2 windows, feed-forward networks; ViT has torch's own attention."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.swin_transformer import (
    ShiftedWindowAttention,
    ShiftedWindowAttentionV2,
    SwinTransformer,
)
from torchvision.models.vision_transformer import VisionTransformer
from torchvision.ops.misc import MLP

from ...convert import (
    POSITION_MLP,
    Context,
    register_attention,
    register_roles,
    set_ffn_roles,
    set_predictor_roles,
)
from ...ops import linear_with_bias, quantized_attention
from ...ops.attention.window import MAX_LOG_SCALE, biased, scaled_and_biased


class ShiftedWindows:
    """Mixin: attention inside shifted windows of a feature map, with both products as modules.

    Source: Swin Transformer (arXiv 2103.14030), section 3.2.
    """

    qk_matmul: Any
    pv_matmul: Any
    qkv: Any
    proj: Any
    num_heads: int
    window_size: list[int]
    shift_size: list[int]
    attention_dropout: float
    dropout: float
    training: bool

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` -> same."""
        B, H, W, C = x.shape
        (h, w), shift = self.window_size, list(self.shift_size)
        x = F.pad(x, (0, 0, 0, -W % w, 0, -H % h))
        rows, columns = x.shape[1] // h, x.shape[2] // w
        shift = [0 if n == 1 else s for n, s in zip((rows, columns), shift, strict=True)]
        if sum(shift):
            x = torch.roll(x, shifts=(-shift[0], -shift[1]), dims=(1, 2))
        x = x.view(B, rows, h, columns, w, C).transpose(2, 3).reshape(-1, h * w, C)
        mask = shift_mask(x, (rows, columns), (h, w), shift) if sum(shift) else None
        x = self._attend(x, mask).view(B, rows, columns, h, w, C)
        x = x.transpose(2, 3).reshape(B, rows * h, columns * w, C)
        if sum(shift):
            x = torch.roll(x, shifts=(shift[0], shift[1]), dims=(1, 2))
        return x[:, :H, :W, :].contiguous()

    def _attend(self: Any, x: Tensor, mask: Tensor | None) -> Tensor:
        """``(B * windows, N, C)`` -> same; ``mask`` is ``(windows, N, N)``."""
        B, N, C = x.shape
        q, k, v = self.projected(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, adjust, extras = self.logit_terms(q, k)
        extras = extras if mask is None else (*extras, mask)
        drop = self.attention_dropout if self.training else 0.0
        x = quantized_attention(self.qk_matmul, self.pv_matmul, q, k, v, adjust, extras, drop)
        x = self.proj(x.transpose(1, 2).reshape(B, N, C))
        return F.dropout(x, self.dropout, self.training)


class QuantShiftedWindowAttention(ShiftedWindows, ShiftedWindowAttention):
    """``ShiftedWindowAttention`` with quantized matmuls."""

    def projected(self, x: Tensor) -> Tensor:
        """``(B, N, C)`` -> ``(B, N, 3 * C)``."""
        return self.qkv(x)

    def logit_terms(self, q: Tensor, k: Tensor) -> tuple[Any, ...]:
        """Scaled queries, keys ``(B, heads, N, D)``, and the position bias."""
        scaled = q * q.shape[-1] ** -0.5
        return scaled, k, biased, (self.get_relative_position_bias(),)


class QuantShiftedWindowAttentionV2(ShiftedWindows, ShiftedWindowAttentionV2):
    """``ShiftedWindowAttentionV2`` (cosine attention) with quantized matmuls."""

    def projected(self, x: Tensor) -> Tensor:
        """As in the first version, without a bias for the keys."""
        if self.qkv.bias is None:
            return self.qkv(x)
        bias = self.qkv.bias.clone()
        bias[x.shape[-1] : 2 * x.shape[-1]].zero_()
        return linear_with_bias(self.qkv, x, bias)

    def logit_terms(self, q: Tensor, k: Tensor) -> tuple[Any, ...]:
        """Normalized queries, keys ``(B, heads, N, D)``, a factor per head, the position bias."""
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        factor = torch.clamp(self.logit_scale, max=MAX_LOG_SCALE).exp()
        return q, k, scaled_and_biased, (factor, self.get_relative_position_bias())


def shift_mask(
    x: Tensor, windows: tuple[int, int], size: tuple[int, int], shift: list[int]
) -> Tensor:
    """Mask of -100 between tokens that only the shift brings into one window, else 0.

    Args:
        x: Tensor with the type and device of the mask.
        windows: Number of windows, vertically and horizontally.
        size: Height and width of a window in tokens.
        shift: Tokens, vertically and horizontally.

    Returns:
        ``(windows, N, N)``.
    """
    (rows, columns), (h, w) = windows, size
    parts = x.new_zeros(rows * h, columns * w)
    for axis, (length, edge) in enumerate(zip(size, shift, strict=True)):
        part = torch.zeros(parts.shape[axis], device=x.device, dtype=x.dtype)
        part[-length:] = 1
        part[-edge or None :] = 2 if edge else 1
        parts = parts + (3 * part[:, None] if axis == 0 else part)
    parts = parts.view(rows, h, columns, w).transpose(1, 2).reshape(rows * columns, h * w)
    return torch.where(parts.unsqueeze(1) != parts.unsqueeze(2), -100.0, 0.0).to(x.dtype)


register_attention({ShiftedWindowAttention: QuantShiftedWindowAttention})
register_attention({ShiftedWindowAttentionV2: QuantShiftedWindowAttentionV2}, POSITION_MLP)
register_roles(MLP)(set_ffn_roles)


@register_roles(VisionTransformer, SwinTransformer)
def give_predictor_roles(module: Any, name: str, context: Context) -> None:
    """Set ``predictor`` for the layer that computes the class scores."""
    set_predictor_roles(module, name, context, r'^(head|heads)$')
