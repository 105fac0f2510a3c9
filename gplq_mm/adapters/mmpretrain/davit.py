# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""DaViT: attention of positions inside windows, attention of channels."""

from typing import Any

from mmpretrain.models.backbones.davit import ChannelAttention, DaViTWindowMSA
from torch import Tensor

from ...conversion import Context, attach_matmuls, register_handler
from ...modules import quantized_attention, swap_class
from ...modules.attention import added
from ...modules.window_attention import masked


class QuantDaViTWindowMSA(DaViTWindowMSA):
    """``DaViTWindowMSA`` with quantized matmuls."""

    qk_matmul: Any
    pv_matmul: Any

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(windows * B, N, C)`` -> same; ``mask`` is ``(windows, N, N)``."""
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D)
        adjust, extras = (added, ()) if mask is None else (masked, (mask,))
        x = quantized_attention(
            self.qk_matmul, self.pv_matmul, q * self.scale, k, v, adjust, extras, self.attn_drop
        )
        x = x.transpose(1, 2).reshape(B, N, C)
        return self.proj_drop(self.proj(x))


class QuantChannelAttention(ChannelAttention):
    """``ChannelAttention`` with quantized matmuls.

    Each channel of the scaled ``k`` attends to those of ``v`` and takes from those of
    ``q``: in this order they have the roles ``query``, ``key`` and ``value``.
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


_QUANTIZED: dict[type, Any] = {
    DaViTWindowMSA: QuantDaViTWindowMSA,
    ChannelAttention: QuantChannelAttention,
}


@register_handler(*_QUANTIZED)
def convert_attention(module: Any, name: str, context: Context) -> None:
    """Both matmuls; ``qkv`` and ``proj`` are children."""
    swap_class(module, _QUANTIZED[type(module)])
    attach_matmuls(module, name, context, module.num_heads)
