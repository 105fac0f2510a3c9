# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""DaViT: attention between positions inside windows, attention between channels."""

from collections.abc import Callable, Sequence
from typing import Any

from mmpretrain.models.backbones.davit import ChannelAttention, DaViTWindowMSA
from torch import Tensor

from .....convert import register_attention
from .....ops import quantized_attention
from .....ops.attention.products import added
from .....ops.attention.window import WindowAttention, masked


class QuantDaViTWindowMSA(WindowAttention, DaViTWindowMSA):
    """``DaViTWindowMSA`` with quantized matmuls."""

    def adjustment(self, mask: Tensor | None) -> tuple[Callable[..., Tensor], Sequence[Tensor]]:
        """No position bias; the mask is ``(windows, N, N)`` or None."""
        return (added, ()) if mask is None else (masked, (mask,))


class QuantChannelAttention(ChannelAttention):
    """``ChannelAttention`` with quantized matmuls.

    Channels of the scaled ``k`` are the queries, those of ``v`` the keys and those of ``q`` the
    values, and have these roles.
    """

    qk_matmul: Any
    pv_matmul: Any

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, C)`` -> same."""
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dims)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D)
        channels = ((k * self.scale).mT, v.mT, q.mT)  # each (B, heads, D, N)
        x = quantized_attention(self.qk_matmul, self.pv_matmul, *channels, added)
        return self.proj(x.permute(0, 3, 1, 2).reshape(B, N, self.embed_dims))


register_attention({DaViTWindowMSA: QuantDaViTWindowMSA, ChannelAttention: QuantChannelAttention})
