# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Forward of BEiT's attention: a bias for each pair of positions, no bias of the keys."""

from typing import Any

import torch
from torch import Tensor

from ..linear import linear_with_bias
from .products import added, quantized_attention
from .window import gathered_bias


class PositionBiasAttention:
    """Mixin that replaces ``forward``; the float class has the parameters.

    Source: BEiT (arXiv 2106.08254); the same in MAE's fine-tuned models.
    """

    qk_matmul: Any
    pv_matmul: Any
    qkv: Any
    attn_drop: Any
    proj: Any
    proj_drop: Any
    bias: Any
    q_bias: Any
    v_bias: Any
    num_heads: int
    scale: float
    relative_position_bias_table: Tensor | None
    relative_position_index: Tensor

    def forward(self, x: Tensor, rel_pos_bias: Tensor | None = None) -> Tensor:
        """``(B, N, C)`` -> same; ``rel_pos_bias`` is ``(heads, N, N)``."""
        B, N, C = x.shape
        qkv = self._qkv(x).reshape(B, N, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D)
        biases = []
        if self.relative_position_bias_table is not None:
            table, index = self.relative_position_bias_table, self.relative_position_index
            biases.append(gathered_bias(table, index))
        if rel_pos_bias is not None:
            biases.append(rel_pos_bias)
        x = quantized_attention(
            self.qk_matmul, self.pv_matmul, q, k, v, added, biases, self.attn_drop, self.scale
        )
        x = x.transpose(1, 2).reshape(B, N, C)
        return self.proj_drop(self.proj(x))

    def _qkv(self, x: Tensor) -> Tensor:
        if self.bias != 'qv_bias':
            return self.qkv(x)
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        return linear_with_bias(self.qkv, x, bias)
