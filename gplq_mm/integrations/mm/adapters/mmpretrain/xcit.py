# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""XCiT: attention between channels, attention of the class token."""

from typing import Any

import torch.nn.functional as F
from mmpretrain.models.backbones.xcit import XCA, ClassAttentionBlock, ClassAttntion, XCABlock
from torch import Tensor

from .....convert import Context, register_attention, register_handler
from .....ops import quantized_attention
from .....ops.attention.products import added, multiplied


class QuantXCA(XCA):
    """``XCA`` with quantized matmuls, of normalized q and k."""

    qk_matmul: Any
    pv_matmul: Any

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, C)`` -> same."""
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 4, 1).unbind(0)  # each (B, heads, D, N)
        q, k, extras = F.normalize(q, dim=-1), F.normalize(k, dim=-1), (self.temperature,)
        x = quantized_attention(
            self.qk_matmul, self.pv_matmul, q, k, v, multiplied, extras, self.attn_drop
        )
        x = x.permute(0, 3, 1, 2).reshape(B, N, C)
        return self.proj_drop(self.proj(x))


class QuantClassAttntion(ClassAttntion):
    """``ClassAttntion`` with quantized matmuls."""

    qk_matmul: Any
    pv_matmul: Any

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, C)`` -> ``(B, 1, C)``, the class token."""
        B, _, C = x.shape
        q, k, v = (
            part.reshape(B, -1, self.num_heads, C // self.num_heads).permute(0, 2, 1, 3)
            for part in (self.q(x[:, 0]), self.k(x), self.v(x))
        )  # (B, heads, 1, D), twice (B, heads, N, D)
        x = quantized_attention(
            self.qk_matmul, self.pv_matmul, q, k, v, added, (), self.attn_drop, self.scale
        )
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, 1, C)))


register_attention({XCA: QuantXCA, ClassAttntion: QuantClassAttntion})


@register_handler(XCABlock, ClassAttentionBlock)
def pass_through(module: Any, name: str, context: Context) -> None:
    """The child ``attn`` is the attention."""
