# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Forward of Swin's window attention with both matmuls as modules (mmdet and mmpretrain)."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .attention import quantized_attention

if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object


def biased(logits: Tensor, bias: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits plus the position bias and the shifted windows' mask.

    Args:
        logits: ``(windows * B, heads, N, N)``.
        bias: ``(1, heads, N, N)``.
        mask: ``(windows, N, N)``, 0 or a large negative number; or None.

    Returns:
        Shape of ``logits``.
    """
    logits = logits + bias
    return logits if mask is None else masked(logits, mask)


def masked(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits plus the mask of each window.

    Args:
        logits: ``(windows * B, heads, N, N)``.
        mask: ``(windows, N, N)``, 0 or a large negative number.

    Returns:
        Shape of ``logits``.
    """
    _, heads, N, _ = logits.shape
    logits = logits.view(-1, len(mask), heads, N, N) + mask.unsqueeze(1).unsqueeze(0)
    return logits.view(-1, heads, N, N)


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
        adjust, extras = self.adjustment(mask)
        x = quantized_attention(
            self.qk_matmul, self.pv_matmul, q * self.scale, k, v, adjust, extras, self.attn_drop
        )
        x = x.transpose(1, 2).reshape(B, N, C)
        return self.proj_drop(self.proj(x))

    def adjustment(self, mask: Tensor | None) -> tuple[Callable[..., Tensor], Sequence[Tensor]]:
        """What comes between product and softmax: see ``quantized_attention``."""
        bias = gathered_bias(self.relative_position_bias_table, self.relative_position_index)
        return biased, ((bias,) if mask is None else (bias, mask))
