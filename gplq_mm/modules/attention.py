# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Scaled dot-product attention written out, so that both matmuls can be quantized."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .matmul import QuantMatMul


def quant_scaled_dot_product_attention(
    qk_matmul: QuantMatMul,
    pv_matmul: QuantMatMul,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    float_attention: Callable[..., Tensor] = F.scaled_dot_product_attention,
) -> Tensor:
    """``softmax(q k^T * scale + mask) v`` with quantized operands.

    Args:
        qk_matmul: Product of scaled queries and keys.
        pv_matmul: Product of probabilities and values.
        query: ``(B, heads, N, D)``.
        key: ``(B, heads, M, D)``.
        value: ``(B, heads, M, D)``.
        attn_mask: Added to the logits (float), or True where attended (bool).
        dropout_p: Dropout probability of the attention weights.
        scale: Factor of the logits; ``D ** -0.5`` if None.
        float_attention: What the float model calls; used as it is while both
            products are off, since a fused kernel rounds differently.

    Returns:
        ``(B, heads, N, D)``.
    """
    if qk_matmul.is_float and pv_matmul.is_float:
        options = {} if scale is None else {'scale': scale}
        return float_attention(
            query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, **options
        )
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    logits = qk_matmul(query * factor, key.transpose(-2, -1))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, float('-inf'))
        else:
            logits = logits + attn_mask
    weights = F.dropout(logits.softmax(dim=-1), dropout_p, training=dropout_p > 0)
    return pv_matmul(weights, value)
