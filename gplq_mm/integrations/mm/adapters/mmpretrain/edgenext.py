# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""EdgeNeXt: attention between channels."""

from functools import partial
from typing import Any

import torch.nn.functional as F
from mmpretrain.models.backbones.edgenext import SDTAEncoder
from mmpretrain.models.utils import ChannelMultiheadAttention
from torch import Tensor

from .....convert import register_attention, register_roles, set_ffn_roles
from .....ops import quantized_attention
from .....ops.attention.products import multiplied


class QuantChannelMultiheadAttention(ChannelMultiheadAttention):
    """``ChannelMultiheadAttention`` with quantized matmuls, of normalized q and k."""

    qk_matmul: Any
    pv_matmul: Any

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, C)`` -> same."""
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dims)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).mT  # each (B, heads, D, N)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        is_learned = isinstance(self.scale, Tensor)  # a tensor of the graph, else a number
        adjust: Any = multiplied if is_learned else partial(multiplied, factor=self.scale)
        extras = (self.scale,) if is_learned else ()
        x = quantized_attention(self.qk_matmul, self.pv_matmul, q, k, v, adjust, extras)
        x = self.proj(x.permute(0, 3, 1, 2).reshape(B, N, self.embed_dims))
        x = self.out_drop(self.proj_drop(x))
        return v.mT.squeeze(1) + x if self.v_shortcut else x


register_attention({ChannelMultiheadAttention: QuantChannelMultiheadAttention})
register_roles(SDTAEncoder)(set_ffn_roles)
