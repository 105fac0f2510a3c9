# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Twins: attention to all subsampled positions, attention inside windows."""

from mmpretrain.models.backbones.twins import (
    GlobalSubsampledAttention,
    LocallyGroupedSelfAttention,
)
from torch import Tensor

from .....convert import register_attention
from .....ops.attention.dot_product import DotProductAttention
from .....ops.attention.grouped import GroupedAttention


class QuantGlobalSubsampledAttention(DotProductAttention, GlobalSubsampledAttention):
    """``GlobalSubsampledAttention`` with quantized matmuls."""

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """``(B, H * W, C)`` -> same."""
        B, N, _ = x.shape
        q = self.q(x).reshape(B, N, self.num_heads, -1).permute(0, 2, 1, 3)
        kv = self.kv(self._subsampled(x, hw_shape))
        kv = kv.reshape(B, -1, 2, self.num_heads, self.head_dims)
        k, v = kv.permute(2, 0, 3, 1, 4)  # each (B, heads, M, D)
        x = self.attend(q, k, v).transpose(1, 2).reshape(B, N, self.embed_dims)
        x = self.out_drop(self.proj_drop(self.proj(x)))
        return v.squeeze(1) + x if self.v_shortcut else x

    def _subsampled(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """``(B, H * W, C)`` -> ``(B, M, C)``, ``M`` smaller by ``sr_ratio ** 2``."""
        if self.sr_ratio <= 1:
            return x
        B, _, C = x.shape
        x = self.sr(x.permute(0, 2, 1).reshape(B, C, *hw_shape))
        return self.norm(x.reshape(B, C, -1).permute(0, 2, 1))


class QuantLocallyGroupedSelfAttention(GroupedAttention, LocallyGroupedSelfAttention):
    """``LocallyGroupedSelfAttention`` with quantized matmuls."""


register_attention(
    {
        GlobalSubsampledAttention: QuantGlobalSubsampledAttention,
        LocallyGroupedSelfAttention: QuantLocallyGroupedSelfAttention,
    }
)
