# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Common part of attention classes that call mmpretrain's ``scaled_dot_product_attention``."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from .products import quant_scaled_dot_product_attention


class DotProductAttention:
    """Mixin for classes with an attribute ``scaled_dot_product_attention``."""

    qk_matmul: Any
    pv_matmul: Any
    attn_drop: float
    training: bool
    scaled_dot_product_attention: Callable[..., Tensor]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """``q`` ``(B, heads, N, D)``, ``k`` and ``v`` ``(B, heads, M, D)`` -> shape of ``q``."""
        return quant_scaled_dot_product_attention(
            self.qk_matmul,
            self.pv_matmul,
            q,
            k,
            v,
            dropout_p=self.attn_drop if self.training else 0.0,
            scale=self._logit_factor(),
            float_attention=self._float_attention,
        )

    def _logit_factor(self) -> float | None:
        """With ``qk_scale`` set, mmpretrain divides the logits by ``D ** -0.5``."""
        attention = self.scaled_dot_product_attention
        return 1 / attention.keywords['scale'] if isinstance(attention, partial) else None

    def _float_attention(self, *args: Any, scale: float | None = None, **options: Any) -> Tensor:
        """Attention function of the float model, with its own scale."""
        return self.scaled_dot_product_attention(*args, **options)
