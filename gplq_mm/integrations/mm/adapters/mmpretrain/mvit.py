# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""MViT: attention to pooled positions with decomposed relative positions."""

from typing import Any

from mmpretrain.models.backbones.mvit import (
    MLP,
    MultiScaleAttention,
    attention_pool,
    resize_decomposed_rel_pos,
)
from torch import Tensor

from .....convert import Context, attach_rel_pos_matmuls, register_ffn, register_handler
from .....ops import swap_class
from .....ops.attention.relative_position import RelPosAttention, Size
from .....ops.feed_forward import MlpFeedForward


class QuantMultiScaleAttention(RelPosAttention, MultiScaleAttention):
    """``MultiScaleAttention`` with quantized matmuls; the pooled q, k and v are quantized."""

    out_dims: int

    def forward(self, x: Tensor, in_size: Size) -> tuple[Tensor, Size]:  # type: ignore[override]
        """``(B, H * W, C)`` -> ``(B, H' * W', C')`` and ``(H', W')``."""
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D)
        q, size = attention_pool(q, self.pool_q, in_size, norm=self.norm_q)
        k, key_size = attention_pool(k, self.pool_k, in_size, norm=self.norm_k)
        v, _ = attention_pool(v, self.pool_v, in_size, norm=self.norm_v)
        x = self.attend(q, k, v, size, key_size)
        if self.residual_pooling:
            x = x + q
        return self.proj(x.transpose(1, 2).reshape(B, -1, self.out_dims)), size

    def tables(self, size: Size, key_size: Size) -> list[Tensor]:
        """One vector per pair of positions: ``(H, Hk, D)`` and ``(W, Wk, D)``."""
        positions = (self.rel_pos_h, self.rel_pos_w)
        return [
            resize_decomposed_rel_pos(position, length, key_length)
            for position, length, key_length in zip(positions, size, key_size, strict=True)
        ]

    def with_positions(self, logits: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
        """As in the base class, summed in the order of the float class."""
        return logits + (rel_h[..., None] + rel_w[..., None, :])


@register_handler(MultiScaleAttention)
def convert_attention(module: Any, name: str, context: Context) -> None:
    """Quantize both matmuls and both relative position products; the pooling is in children."""
    swap_class(module, QuantMultiScaleAttention)
    module.use_rel_pos = module.rel_pos_spatial
    attach_rel_pos_matmuls(module, name, context)


class QuantMLP(MlpFeedForward, MLP):
    """``MLP`` as one operator, if the engine fuses it."""


register_ffn(MLP, QuantMLP)
