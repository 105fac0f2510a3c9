# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Forward of Swin's window attention with both matmuls as modules (mmdet and mmpretrain)."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object


def masked_softmax(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over keys, with the shifted windows' mask added before.

    Args:
        logits: ``(windows * B, heads, N, N)``.
        mask: ``(windows, N, N)``, 0 or a large negative number; or None.

    Returns:
        Probabilities, shape of ``logits``.
    """
    if mask is not None:
        _, heads, N, _ = logits.shape
        logits = logits.view(-1, len(mask), heads, N, N) + mask.unsqueeze(1).unsqueeze(0)
        logits = logits.view(-1, heads, N, N)
    return logits.softmax(dim=-1)


def gathered_bias(table: Tensor, index: Tensor) -> Tensor:
    """Relative position bias of each pair of tokens, ``(1, heads, N, N)``.

    Args:
        table: ``(distances, heads)``.
        index: Row of the table for each pair, ``(N, N)``.
    """
    bias = table[index.view(-1)].view(*index.shape, -1)
    return bias.permute(2, 0, 1).contiguous().unsqueeze(0)


class WindowAttention(_Base):
    """Mixin that replaces ``forward``; the float class brings the parameters.

    Source: Swin Transformer (arXiv 2103.14030), section 3.2.
    """

    qkv: Any
    qk_matmul: Any
    pv_matmul: Any
    attn_drop: Any
    proj: Any
    proj_drop: Any
    num_heads: int
    scale: float
    relative_position_bias_table: Tensor
    relative_position_index: Tensor

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(windows * B, N, C)`` -> same; ``mask`` is ``(windows, N, N)``."""
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D)
        logits = self.qk_matmul(q * self.scale, k.transpose(-2, -1))
        bias = gathered_bias(self.relative_position_bias_table, self.relative_position_index)
        weights = self.attn_drop(masked_softmax(logits + bias, mask))
        x = self.pv_matmul(weights, v).transpose(1, 2).reshape(B, N, C)
        return self.proj_drop(self.proj(x))
