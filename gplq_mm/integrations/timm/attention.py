# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Attention between all tokens: ViT, DeiT, EVA, BEiT; fused attention becomes two matmuls."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import apply_rot_embed_cat
from timm.models import beit, eva, vision_transformer
from torch import Tensor

from ...compat.timm import relative_position_bias
from ...convert import Context, child_name, register_attention, register_handler
from ...ops import biased_qkv, quantized_attention
from ...ops.attention.products import added


class AttentionProducts:
    """Mixin: both products as modules, and the steps of timm's classes after them."""

    qk_matmul: Any
    pv_matmul: Any
    qkv: Any
    scale: float
    num_heads: int
    attn_drop: Any
    proj: Any
    proj_drop: Any

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], gate: Tensor | None = None
    ) -> Tensor:
        """``(B, heads, N, D)`` each -> ``(B, N, C)``; ``extras`` are biases and masks."""
        x = quantized_attention(
            self.qk_matmul, self.pv_matmul, q, k, v, added, extras, self.attn_drop, self.scale
        )
        x = x.transpose(1, 2).flatten(2)
        norm = getattr(self, 'norm', None)
        x = x if norm is None else norm(x)
        return self.proj_drop(self.proj(x if gate is None else x * gate))

    def gate_of(self, x: Tensor) -> Tensor | None:
        """Factor of the output if the class has a gate, ``(B, N, C)``."""
        gate = getattr(self, 'gate', None)
        return None if gate is None else gate(x).sigmoid()

    def split(self, qkv: Tensor) -> list[Tensor]:
        """``(B, N, 3 * C)`` -> q, k and v, each ``(B, heads, N, D)``."""
        B, N, _ = qkv.shape
        return list(qkv.reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0))


def masks(x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> tuple[Tensor, ...]:
    """Mask added to the logits of tokens ``(B, N, C)``; ``is_causal`` wins, as in timm."""
    if is_causal:
        return (x.new_full((x.shape[1], x.shape[1]), float('-inf')).triu_(1),)
    return () if attn_mask is None else (attn_mask,)


class QuantAttention(AttentionProducts, vision_transformer.Attention):
    """``Attention`` of ViT and DeiT with quantized matmuls."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """``(B, N, C)`` -> same."""
        gate = self.gate_of(x)
        q, k, v = self.split(self.qkv(x))
        q, k = self.q_norm(q), self.k_norm(k)
        return self.attend(q, k, v, masks(x, attn_mask, is_causal), gate)


class QuantEvaAttention(AttentionProducts, eva.EvaAttention):
    """``EvaAttention`` with quantized matmuls; the rotated q and k are quantized."""

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """``(B, N, C)`` -> same."""
        gate = self.gate_of(x)
        q, k, v = self.split(biased_qkv(self, x)) if self.qkv is not None else self._projected(x)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = self._rotated(q, rope).type_as(v), self._rotated(k, rope).type_as(v)
        return self.attend(q, k, v, masks(x, attn_mask, is_causal), gate)

    def _projected(self, x: Tensor) -> list[Tensor]:
        B, N, _ = x.shape
        layers = (self.q_proj, self.k_proj, self.v_proj)
        return [la(x).reshape(B, N, self.num_heads, -1).transpose(1, 2) for la in layers]

    def _rotated(self, x: Tensor, rope: Tensor) -> Tensor:
        """Apply rotary position embedding to all but the prefix tokens of ``(B, heads, N, D)``."""
        first, half = self.num_prefix_tokens, getattr(self, 'rotate_half', False)
        options = {'half': True} if half else {}
        rotated = apply_rot_embed_cat(x[:, :, first:, :], rope, **options)
        return torch.cat([x[:, :, :first, :], rotated], dim=2)


class QuantBeitAttention(AttentionProducts, beit.Attention):
    """``Attention`` of BEiT with quantized matmuls."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """``(B, N, C)`` -> same; the bias is ``(1, heads, N, N)``."""
        q, k, v = self.split(biased_qkv(self, x))
        own = [] if self.relative_position_bias_table is None else [relative_position_bias(self)]
        shared = [] if shared_rel_pos_bias is None else [shared_rel_pos_bias]
        return self.attend(q, k, v, [*own, *shared])


register_attention(
    {
        vision_transformer.Attention: QuantAttention,
        eva.EvaAttention: QuantEvaAttention,
        beit.Attention: QuantBeitAttention,
    }
)


@register_handler(
    *(
        getattr(vision_transformer, name)
        for name in ('ParallelScalingBlock', 'DiffParallelScalingBlock')
        if hasattr(vision_transformer, name)
    )
)
def keep_products_float(module: Any, name: str, context: Context) -> None:
    """The layers are children; the attention is part of the block's own forward and stays float."""
    context.keep_float(child_name(name, 'matmuls'), f'no handler for {type(module).__name__}')
