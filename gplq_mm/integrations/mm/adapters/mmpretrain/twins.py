# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Twins: attention to all subsampled positions, attention inside windows."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from mmpretrain.models.backbones.twins import (
    GlobalSubsampledAttention,
    LocallyGroupedSelfAttention,
)
from torch import Tensor

from .....convert import register_attention
from .....ops import quantized_attention
from .....ops.attention.dot_product import DotProductAttention
from .....ops.attention.window import multiplied_and_masked


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


class QuantLocallyGroupedSelfAttention(LocallyGroupedSelfAttention):
    """``LocallyGroupedSelfAttention`` with quantized matmuls."""

    qk_matmul: Any
    pv_matmul: Any

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """``(B, H * W, C)`` -> same."""
        B, N, C = x.shape
        (H, W), S = hw_shape, self.window_size
        x = F.pad(x.view(B, H, W, C), (0, 0, 0, -W % S, 0, -H % S))
        rows, columns = x.shape[1] // S, x.shape[2] // S
        x = x.reshape(B, rows, S, columns, S, C).transpose(2, 3)
        x = self._attend(self.qkv(x), self._mask(x, -H % S, -W % S))
        x = x.reshape(B, rows, columns, S, S, C).transpose(2, 3)
        x = x.reshape(B, rows * S, columns * S, C)[:, :H, :W].reshape(B, N, C)
        return self.proj_drop(self.proj(x))

    def _attend(self, qkv: Tensor, mask: Tensor) -> Tensor:
        """``(B, rows, columns, S, S, 3 * C)`` -> ``(B * windows, S * S, heads, D)``."""
        N = self.window_size**2
        qkv = qkv.reshape(-1, N, 3, self.num_heads, self.embed_dims // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B * windows, heads, S * S, D)
        adjust = partial(multiplied_and_masked, factor=self.scale)
        x = quantized_attention(
            self.qk_matmul, self.pv_matmul, q, k, v, adjust, (mask,), self.attn_drop
        )
        return x.transpose(1, 2)

    def _mask(self, x: Tensor, bottom: int, right: int) -> Tensor:
        """Mask ``(windows, S * S, S * S)``: -1000 between image and padding, as in the float class.

        Args:
            x: ``(B, rows, columns, S, S, C)``.
            bottom: Rows of padding.
            right: Columns of padding.
        """
        _, rows, columns, S, _, _ = x.shape
        padding = torch.zeros(rows * S, columns * S, device=x.device)
        padding[-bottom:] = 1  # for 0 the slice is the whole map, as in the float class
        padding[:, -right:] = 1
        padding = padding.reshape(rows, S, columns, S).transpose(1, 2).reshape(-1, S * S)
        return torch.where(padding.unsqueeze(1) != padding.unsqueeze(2), -1000.0, 0.0)


register_attention(
    {
        GlobalSubsampledAttention: QuantGlobalSubsampledAttention,
        LocallyGroupedSelfAttention: QuantLocallyGroupedSelfAttention,
    }
)
