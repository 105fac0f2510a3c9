# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""MixMIM: window attention of two mixed images."""

from typing import Any

import torch
from mmpretrain.models.backbones.mixmim import MixMIMWindowAttention
from torch import Tensor

from ...conversion import Context, attach_matmuls, register_handler
from ...modules import quantized_attention, swap_class
from ...modules.attention import added
from ...modules.window_attention import gathered_bias


class QuantMixMIMWindowAttention(MixMIMWindowAttention):
    """``MixMIMWindowAttention`` with quantized matmuls."""

    qk_matmul: Any
    pv_matmul: Any

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(windows * B, N, C)`` -> same; ``mask`` is 1 for one image's tokens, else 0."""
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D)
        extras = [gathered_bias(self.relative_position_bias_table, self.relative_position_index)]
        if mask is not None:
            extras.append(_apart(mask.reshape(B, 1, 1, N)))
        x = quantized_attention(
            self.qk_matmul, self.pv_matmul, q * self.scale, k, v, added, extras, self.attn_drop
        )
        x = x.transpose(1, 2).reshape(B, N, C)
        return self.proj_drop(self.proj(x))


def _apart(mask: Tensor) -> Tensor:
    """``(B, 1, 1, N)`` -> ``(B, 1, N, N)``: hugely negative between tokens of two images."""
    together = mask * mask.mT + (1 - mask) * (1 - mask).mT
    return (65500 if mask.dtype == torch.float16 else 1e30) * (together - 1)


@register_handler(MixMIMWindowAttention)
def convert_attention(module: Any, name: str, context: Context) -> None:
    """Both matmuls; ``qkv`` and ``proj`` are children."""
    swap_class(module, QuantMixMIMWindowAttention)
    attach_matmuls(module, name, context, module.num_heads)
