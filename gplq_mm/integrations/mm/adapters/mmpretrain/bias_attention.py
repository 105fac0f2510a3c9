# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Attention with a learned bias per pair of positions: LeViT, TinyViT, EfficientFormer, HiViT."""

from functools import partial
from typing import Any

from mmpretrain.models.backbones import efficientformer, hivit, levit
from mmpretrain.models.utils import LeAttention
from torch import Tensor

from .....convert import register_attention, register_ffn
from .....ops import quantized_attention
from .....ops.attention.products import added, multiplied_and_added
from .....ops.feed_forward import MlpFeedForward


class BiasAttention:
    """Mixin: attention whose keys and values may have different widths, plus a bias."""

    qk_matmul: Any
    pv_matmul: Any
    scale: float
    training: bool
    attention_biases: Tensor
    attention_bias_idxs: Tensor
    ab: Tensor
    dh: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Operands ``(B, heads, N, D)`` -> ``(B, N, heads * D)``."""
        bias = self.attention_biases[:, self.attention_bias_idxs] if self.training else self.ab
        adjust = partial(multiplied_and_added, factor=self.scale)
        x = quantized_attention(self.qk_matmul, self.pv_matmul, q, k, v, adjust, (bias,))
        return x.transpose(1, 2).reshape(len(q), -1, self.dh)

    def split(self: Any, qkv: Tensor) -> list[Tensor]:
        """``(B, N, C)`` -> q, k, v, each ``(B, heads, N, D)``."""
        B, N, _ = qkv.shape
        sizes = [self.key_dim, self.key_dim, self.d]
        parts = qkv.view(B, N, self.num_heads, -1).split(sizes, dim=3)
        return [part.permute(0, 2, 1, 3) for part in parts]


class QuantLeAttention(BiasAttention, LeAttention):
    """TinyViT's ``LeAttention`` with quantized matmuls."""

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, C)`` -> same."""
        return self.proj(self.attend(*self.split(self.qkv(self.norm(x)))))


class QuantLeViTAttention(BiasAttention, levit.Attention):
    """LeViT's ``Attention`` with quantized matmuls."""

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, C)`` -> same."""
        return self.proj(self.attend(*self.split(self.qkv(x))))


class QuantAttentionWithBias(BiasAttention, efficientformer.AttentionWithBias):
    """EfficientFormer's ``AttentionWithBias`` with quantized matmuls."""

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, C)`` -> same."""
        return self.proj(self.attend(*self.split(self.qkv(x))))


class QuantAttentionSubsample(BiasAttention, levit.AttentionSubsample):
    """LeViT's ``AttentionSubsample`` with quantized matmuls."""

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, C)`` -> ``(B, N / stride ** 2, C')``."""
        B, N, _ = x.shape
        kv = self.kv(x).view(B, N, self.num_heads, -1).split([self.key_dim, self.d], dim=3)
        k, v = (part.permute(0, 2, 1, 3) for part in kv)
        q = self.q(x).view(B, self.sub_resolution**2, self.num_heads, self.key_dim)
        return self.proj(self.attend(q.permute(0, 2, 1, 3), k, v))


class QuantHiViTAttention(hivit.Attention):
    """HiViT's ``Attention`` with quantized matmuls."""

    qk_matmul: Any
    pv_matmul: Any

    def forward(
        self, x: Tensor, rpe_index: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """``(B, N, C)`` -> same; ``mask`` is True where attended, ``(B, N)``."""
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D)
        extras = []
        if rpe_index is not None:
            bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
            S = round(self.relative_position_index.numel() ** 0.5)
            bias = bias.view(-1, S, S, self.num_heads).permute(0, 3, 1, 2).contiguous()
            extras.append(bias)
        if mask is not None:
            extras.append(mask.bool()[:, None, None, :])
        x = quantized_attention(
            self.qk_matmul, self.pv_matmul, q, k, v, added, extras, self.attn_drop, self.scale
        )
        x = x.transpose(1, 2).reshape(B, N, C)
        return self.proj_drop(self.proj(x))


register_attention(
    {
        LeAttention: QuantLeAttention,
        levit.Attention: QuantLeViTAttention,
        levit.AttentionSubsample: QuantAttentionSubsample,
        efficientformer.AttentionWithBias: QuantAttentionWithBias,
        hivit.Attention: QuantHiViTAttention,
    }
)


class QuantMlp(MlpFeedForward, hivit.Mlp):
    """``Mlp`` as one operator, if the engine fuses it."""


register_ffn(hivit.Mlp, QuantMlp)
