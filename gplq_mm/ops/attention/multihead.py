# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""QuantMultiheadAttention: torch's ``nn.MultiheadAttention`` with every product quantized."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ...compat.torch import has_forward_pre_hooks
from ...quantizers import FakeQuantizer
from ..linear import QuantLinear
from .products import TERMS, Attention, Term, quantized_attention

PARTS = ('q', 'k', 'v')


class InProjection(nn.Linear):
    """One third of the input projection as a layer; the attention owns the weight.

    ``weight`` is a view of ``in_proj_weight`` (or ``q_proj_weight`` and the like), so
    that this module adds no parameter and no state-dict key. A weight assigned to it
    replaces the view until the view is assigned back.

    Args:
        attention: The attention module; not registered here.
        part: ``q``, ``k`` or ``v``.
    """

    def __init__(self, attention: nn.MultiheadAttention, part: str) -> None:
        nn.Module.__init__(self)
        self._attention = (attention,)
        self._part = PARTS.index(part)
        self._replacement: tuple[Tensor, ...] = ()
        self.out_features, self.in_features = self.weight.shape

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """``(embed_dim, in_features)``."""
        return self._replacement[0] if self._replacement else self._view()

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """``(embed_dim,)``, or None."""
        bias = self._attention[0].in_proj_bias
        return None if bias is None else bias.chunk(3)[self._part]

    def _view(self) -> Tensor:
        attention = self._attention[0]
        packed: Tensor | None = attention.in_proj_weight
        if packed is not None:
            return packed.chunk(3)[self._part]
        return getattr(attention, f'{PARTS[self._part]}_proj_weight')

    def __setattr__(self, name: str, value: Any) -> None:
        if name == 'weight':
            is_view = value.data_ptr() == self._view().data_ptr()
            self._replacement = () if is_view else (value,)
        else:
            super().__setattr__(name, value)


class QuantInProjection(QuantLinear, InProjection):
    """``InProjection`` with fake-quantized operands."""


class QuantOutProjection(QuantLinear, NonDynamicallyQuantizableLinear):
    """The output projection with fake-quantized operands."""


class QuantMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with four quantized projections and two quantized matmuls.

    With ``need_weights=False`` training saves packed codes of q, k and v only. While every
    quantizer is off it calls torch's own forward.
    """

    in_proj_q: InProjection
    in_proj_k: InProjection
    in_proj_v: InProjection
    qk_matmul: Any
    pv_matmul: Any

    @property
    def is_float(self) -> bool:
        """Whether no quantizer quantizes or observes, and no layer has a forward pre-hook."""
        quantizers = (m for m in self.modules() if isinstance(m, FakeQuantizer))
        if any(q.enabled or q.observer is not None for q in quantizers):
            return False
        return not any(has_forward_pre_hooks(layer) for layer in self.children())

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention.forward``, with the same shapes.

        Raises:
            RuntimeError: If ``is_causal`` is set without ``attn_mask``.
        """
        if self.is_float:
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        if is_causal and attn_mask is None:
            raise RuntimeError('is_causal is a hint only: give the causal mask as attn_mask')
        is_batched = query.dim() == 3
        if not is_batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        masks = self._masks(attn_mask, key_padding_mask)
        out, weights = self._attend(query, key, value, masks, need_weights)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not is_batched:
            out = out.squeeze(0)
            weights = None if weights is None else weights.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return out, weights

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, masks: Sequence[Tensor], need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Batch first: ``(B, L, E)``, and weights ``(B, heads, L, S)`` if they are needed."""
        q = self._heads(self.in_proj_q(query)) * self.head_dim**-0.5
        k = self._heads(self._extended(self.in_proj_k(key), self.bias_k))
        v = self._heads(self._extended(self.in_proj_v(value), self.bias_v))
        dropout = self.dropout if self.training else 0.0
        products, weights = (self.qk_matmul, self.pv_matmul), None
        if need_weights:  # product by product, not as one operation: the weights are returned
            attention = Attention(*products, masked, masks, dropout)
            weights = attention.weights(q, k.transpose(-2, -1))
            out = self.pv_matmul(weights, v)
        else:
            out = quantized_attention(*products, q, k, v, masked, masks, dropout)
        return self.out_proj(out.transpose(1, 2).flatten(2)), weights

    def _heads(self, x: Tensor) -> Tensor:
        """``(B, L, E)`` -> ``(B, heads, L, D)``."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _extended(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Keys or values followed by the learned and the zero token, ``(B, S', E)``."""
        if bias is not None:
            x = torch.cat([x, bias.expand(len(x), -1, -1)], dim=1)
        if self.add_zero_attn:
            x = F.pad(x, (0, 0, 0, 1))
        return x

    def _masks(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> list[Tensor]:
        """The masks that are given, each broadcastable to ``(B, heads, L, S)``."""
        masks = []
        if attn_mask is not None:
            is_batched = attn_mask.dim() == 3
            masks.append(attn_mask.unflatten(0, (-1, self.num_heads)) if is_batched else attn_mask)
        if key_padding_mask is not None:
            masks.append(key_padding_mask[:, None, None, :])
        return masks


def masked(logits: Tensor, *masks: Tensor) -> Tensor:
    """Logits ``(B, heads, N, M)`` plus the sum of the masks; keys added at the end are unmasked."""
    if not masks:
        return logits
    mask = _sum_of(masks, logits.dtype)
    return logits + F.pad(mask, (0, logits.shape[-1] - mask.shape[-1]))


def _sum_of(masks: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Boolean masks (True is masked) count as 0 and minus infinity."""
    first, *others = (_as_float(mask, dtype) for mask in masks)
    return sum(others, first)


def _as_float(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float('-inf'))


TERMS[masked] = lambda *masks: [Term(_sum_of(masks, torch.float32))] if masks else []
