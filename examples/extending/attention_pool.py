# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Quantizes timm's attention pooling, which SigLIP models end with; imported before conversion."""

from timm.layers import AttentionPoolLatent
from torch import Tensor

from gplq_mm.convert import register_attention
from gplq_mm.ops import quant_scaled_dot_product_attention


class QuantAttentionPoolLatent(AttentionPoolLatent):
    """``AttentionPoolLatent`` with both products quantized."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """``(B, N, C)`` -> ``(B, C)``."""
        if self.qk_matmul.is_float and self.pv_matmul.is_float:
            return super().forward(x, attn_mask)
        if self.pos_embed is not None:
            x = x + self.pos_embed.unsqueeze(0).to(x.dtype)
        q = self.q(self.latent.expand(len(x), -1, -1))
        k, v = self.kv(x).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        q, k = self.q_norm(q), self.k_norm(k)
        x = quant_scaled_dot_product_attention(
            self.qk_matmul, self.pv_matmul, q, k, v, attn_mask, scale=self.scale
        )
        x = self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))
        if self.mlp is not None:
            x = x + self.mlp(self.norm(x))
        return x[:, 0] if self.pool == 'token' else x.mean(1) if self.pool == 'avg' else x


register_attention({AttentionPoolLatent: QuantAttentionPoolLatent})
