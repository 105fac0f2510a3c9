# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Forward of the window attention of Swin and Swin V2, with both matmuls as modules."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .products import TERMS, Term, bias_term, factor_term, quantized_attention

if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object

MAX_LOG_SCALE = math.log(100.0)
"""Upper bound of the logarithm of Swin V2's learned factor (arXiv 2111.09883, section 3.3)."""


def biased(logits: Tensor, bias: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits plus the position bias and the mask of shifted windows.

    Args:
        logits: ``(windows * B, heads, N, N)``.
        bias: ``(1, heads, N, N)``.
        mask: ``(windows, N, N)``, 0 or a large negative number; or None.

    Returns:
        Shape of ``logits``.
    """
    logits = logits + bias
    return logits if mask is None else masked(logits, mask)


def scaled_and_biased(logits: Tensor, factor: Tensor, *bias_and_mask: Tensor) -> Tensor:
    """Logits times a factor per head, plus bias and mask.

    Args:
        logits: ``(windows * B, heads, N, N)``.
        factor: ``(heads, 1, 1)``.
        *bias_and_mask: As for ``biased``.

    Returns:
        Shape of ``logits``.
    """
    return biased(logits * factor, *bias_and_mask)


def masked(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits plus the mask of each window.

    Args:
        logits: ``(windows * B, heads, N, N)``.
        mask: ``(windows, N, N)``, 0 or a large negative number.

    Returns:
        Shape of ``logits``.
    """
    _, heads, N, _ = logits.shape
    logits = logits.view(-1, mask.shape[0], heads, N, N) + mask.unsqueeze(1).unsqueeze(0)
    return logits.view(-1, heads, N, N)


def multiplied_and_masked(logits: Tensor, mask: Tensor, *, factor: float) -> Tensor:
    """Logits times a factor, plus the mask of each window as for ``masked``."""
    return masked(logits * factor, mask)


def _terms(bias: Tensor, mask: Tensor | None = None) -> list[Term]:
    return [bias_term(bias), *(() if mask is None else TERMS[masked](mask))]


TERMS[biased] = _terms
TERMS[masked] = lambda mask: [bias_term(mask.unsqueeze(1))]
TERMS[scaled_and_biased] = lambda factor, *rest: [factor_term(factor), *_terms(*rest)]
TERMS[multiplied_and_masked] = lambda mask, factor: [factor_term(factor), *TERMS[masked](mask)]


def gathered_bias(table: Tensor, index: Tensor) -> Tensor:
    """Relative position bias of each pair of tokens, ``(1, heads, N, N)``.

    Args:
        table: ``(distances, heads)``.
        index: Row of the table for each pair, ``(N, N)``.
    """
    bias = table[index.view(-1)].view(*index.shape, -1)
    return bias.permute(2, 0, 1).contiguous().unsqueeze(0)


class WindowAttention(_Base):
    """Mixin that replaces ``forward``; the float class has the parameters.

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
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D)
        adjust, extras = self.adjustment(mask)
        products = self.qk_matmul, self.pv_matmul
        x = quantized_attention(*products, q, k, v, adjust, extras, self.attn_drop, self.scale)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))

    def adjustment(self, mask: Tensor | None) -> tuple[Callable[..., Tensor], Sequence[Tensor]]:
        """``adjust`` and ``extras`` of ``quantized_attention``; the mask is ``(windows, N, N)``."""
        bias = gathered_bias(self.relative_position_bias_table, self.relative_position_index)
        return biased, ((bias,) if mask is None else (bias, mask))


class CosineWindowAttention(_Base):
    """Mixin that replaces ``forward``; the float class has the parameters.

    Source: Swin Transformer V2 (arXiv 2111.09883), sections 3.3 and 3.4.
    """

    qk_matmul: Any
    pv_matmul: Any
    attn_drop: Any
    proj: Any
    proj_drop: Any
    cpb_mlp: Any
    num_heads: int
    logit_scale: Tensor
    relative_coords_table: Tensor
    relative_position_index: Tensor

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(windows * B, N, C)`` -> same; ``mask`` is ``(windows, N, N)``."""
        B, N, _ = x.shape
        qkv = self.projected(x).reshape(B, N, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        factor = torch.clamp(self.logit_scale, max=MAX_LOG_SCALE).exp()
        extras = (factor, self.position_bias(), *(() if mask is None else (mask,)))
        x = quantized_attention(
            self.qk_matmul, self.pv_matmul, q, k, v, scaled_and_biased, extras, self.attn_drop
        )
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))

    def projected(self, x: Tensor) -> Tensor:
        """``(B, N, C)`` -> ``(B, N, 3 * C)``; the bias has no part for the keys."""
        raise NotImplementedError

    def position_bias(self) -> Tensor:
        """Continuous position bias, ``(1, heads, N, N)``."""
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        return 16 * torch.sigmoid(gathered_bias(table, self.relative_position_index))
