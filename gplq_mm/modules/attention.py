# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Scaled dot-product attention written out, so that both matmuls can be quantized."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quantizers import FakeQuantizer
from .engine import packs
from .fused_attention import packed_attention
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
    extras = () if attn_mask is None else (attn_mask,)
    return quantized_attention(
        qk_matmul, pv_matmul, query * factor, key, value, added, extras, dropout_p
    )


def added(logits: Tensor, *terms: Tensor) -> Tensor:
    """Logits plus float biases and masks; minus infinity where a bool mask is False."""
    for term in terms:
        if term.dtype == torch.bool:
            logits = logits.masked_fill(~term, float('-inf'))
        else:
            logits = logits + term
    return logits


def multiplied(logits: Tensor, factor: Tensor | float) -> Tensor:
    """Logits times a factor that broadcasts over them, as a learned one a head."""
    return logits * factor


def quantized_attention(
    qk_matmul: Any,
    pv_matmul: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    adjust: Callable[..., Tensor],
    extras: Sequence[Tensor] = (),
    dropout: float | nn.Module = 0.0,
) -> Tensor:
    """``softmax(adjust(q k^T, *extras)) v`` with the two products as modules.

    The fused engine saves packed codes of q, k and v only, unless a product is float or
    there is dropout between softmax and product: then both are computed as they stand.

    Args:
        qk_matmul: ``QuantMatMul`` of queries and transposed keys, or a ``FloatMatMul``.
        pv_matmul: The same of probabilities and values.
        q: Scaled queries, ``(B, heads, N, D)``.
        k: Keys, ``(B, heads, M, D)``.
        v: Values, ``(B, heads, M, D')``.
        adjust: What comes between product and softmax. It may use no tensor of the graph
            but its arguments.
        extras: Its further arguments (bias, mask, factor).
        dropout: Of the attention weights: a probability, 0 outside training, or a module.

    Returns:
        ``(B, heads, N, D')``.
    """
    keys = k.transpose(-2, -1)
    if not _drops(dropout) and can_pack_attention(qk_matmul, pv_matmul):

        def logits(q: Tensor, k: Tensor, *extras: Tensor) -> Tensor:
            return adjust(q @ k, *extras)

        quantizers = attention_quantizers(qk_matmul, pv_matmul)
        return packed_attention(quantizers, logits, q, keys, v, extras)
    weights = adjust(qk_matmul(q, keys), *extras).softmax(dim=-1)
    if isinstance(dropout, nn.Module):
        weights = dropout(weights)
    elif dropout > 0:
        weights = F.dropout(weights, dropout)
    return pv_matmul(weights, v)


def _drops(dropout: float | nn.Module) -> bool:
    """Whether attention weights are dropped now; an unknown module may do anything."""
    if isinstance(dropout, nn.Dropout):
        return dropout.training and dropout.p > 0
    if isinstance(dropout, nn.Module):
        return not isinstance(dropout, nn.Identity)
    return dropout > 0


def can_pack_attention(qk_matmul: Any, pv_matmul: Any) -> bool:
    """Whether both products are quantized, in training, by the fused engine."""
    products = (qk_matmul, pv_matmul)
    if not all(isinstance(m, QuantMatMul) for m in products):
        return False
    q, k, probabilities, v = attention_quantizers(*products)
    return packs(qk_matmul.engine, q, k, v, recomputed=[probabilities])


def attention_quantizers(qk_matmul: Any, pv_matmul: Any) -> list[FakeQuantizer]:
    """Quantizers of queries, keys, probabilities and values."""
    return [
        qk_matmul.lhs_quantizer,
        qk_matmul.rhs_quantizer,
        pv_matmul.lhs_quantizer,
        pv_matmul.rhs_quantizer,
    ]
