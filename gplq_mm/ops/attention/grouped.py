# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Forward of Twins' attention inside windows of a padded map."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .products import quantized_attention
from .window import multiplied_and_masked


class GroupedAttention:
    """Mixin that replaces ``forward``; the float class has the parameters.

    Source: Twins-SVT (arXiv 2104.13840), section 3.2.
    """

    qk_matmul: Any
    pv_matmul: Any
    qkv: Any
    attn_drop: Any
    proj: Any
    proj_drop: Any
    embed_dims: int
    num_heads: int
    scale: float
    window_size: int

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
