# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""EdgeNeXt: attention of channels."""

from typing import Any

import torch.nn.functional as F
from mmpretrain.models.backbones.edgenext import SDTAEncoder
from mmpretrain.models.utils import ChannelMultiheadAttention
from torch import Tensor

from ...conversion import (
    Context,
    attach_matmuls,
    register_handler,
    register_roles,
    set_ffn_roles,
)
from ...modules import quantized_attention, swap_class
from ...modules.attention import multiplied


class QuantChannelMultiheadAttention(ChannelMultiheadAttention):
    """``ChannelMultiheadAttention`` with quantized matmuls, of normalized q and k."""

    qk_matmul: Any
    pv_matmul: Any

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, C)`` -> same."""
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dims)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).mT  # each (B, heads, D, N)
        x = self._attend(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v)
        x = self.proj(x.permute(0, 3, 1, 2).reshape(B, N, self.embed_dims))
        x = self.out_drop(self.proj_drop(x))
        return v.mT.squeeze(1) + x if self.v_shortcut else x

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Operands ``(B, heads, D, N)`` -> same; the class never drops attention weights."""
        scale = self.scale
        if isinstance(scale, Tensor):
            return quantized_attention(
                self.qk_matmul, self.pv_matmul, q, k, v, multiplied, (scale,)
            )
        return quantized_attention(
            self.qk_matmul, self.pv_matmul, q, k, v, lambda logits: logits * scale
        )


@register_handler(ChannelMultiheadAttention)
def convert_attention(module: Any, name: str, context: Context) -> None:
    """Both matmuls; ``qkv`` and ``proj`` are children."""
    swap_class(module, QuantChannelMultiheadAttention)
    attach_matmuls(module, name, context, module.num_heads)


@register_roles(SDTAEncoder)
def give_ffn_roles(module: Any, name: str, context: Context) -> None:
    """``post_gelu`` behind the activation."""
    set_ffn_roles(module, name, context)
