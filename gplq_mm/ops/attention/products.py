# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Scaled dot-product attention written out, so that both matmuls can be quantized."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dispatch import compute
from ..engine import REFERENCE
from ..matmul import QuantMatMul
from ..operation import Codes, Operand, Operation


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
        float_attention: Attention function of the float model; called unchanged while
            both products are off, since a fused kernel rounds differently.

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
        qk_matmul, pv_matmul, query, key, value, added, extras, dropout_p, query_factor=factor
    )


class Term(NamedTuple):
    """One step of an ``adjust`` function: a tensor that changes each logit by itself.

    Attributes:
        tensor: Float, broadcasts to logits ``(B, heads, N, M)``, except that its first axis may
            have a divisor ``b`` of ``B`` as length: entry ``i`` belongs to the batches ``i``,
            ``i + b`` and so on.
        multiplies: Whether the logits are multiplied by it; else it is added.
        grid: ``(Hk, Wk)`` if the tensor has five axes and broadcasts to ``(B, heads, N, Hk, Wk)``,
            where ``M = Hk * Wk``.
    """

    tensor: Tensor
    multiplies: bool = False
    grid: tuple[int, int] | None = None


TERMS: dict[Callable[..., Tensor], Callable[..., list[Term]]] = {}
"""``TERMS[adjust](*extras)`` are the steps of an ``adjust`` function of ``Attention`` in their
order; those of a ``partial`` get its keywords too. A function that is missing here is called as a
whole."""


def added(logits: Tensor, *terms: Tensor) -> Tensor:
    """Logits ``(..., N, M)`` plus float biases and masks; -inf where a bool mask is False."""
    for term in terms:
        if term.dtype == torch.bool:
            logits = logits.masked_fill(~term, float('-inf'))
        else:
            logits = logits + term
    return logits


def multiplied(logits: Tensor, factor: Tensor | float) -> Tensor:
    """Logits ``(..., N, M)`` times a factor that broadcasts over them, such as one per head."""
    return logits * factor


def multiplied_and_added(logits: Tensor, *terms: Tensor, factor: float) -> Tensor:
    """Logits times a factor, plus biases and masks as for ``added``."""
    return added(logits * factor, *terms)


def _added(*terms: Tensor) -> list[Term]:
    return [bias_term(term) for term in terms]


def bias_term(bias: Tensor) -> Term:
    """Term that adds a bias, or a mask that is True where attended; broadcasts to the logits.

    Args:
        bias: ``(B, heads, N, M)`` or a shape that broadcasts to it.
    """
    if bias.dtype == torch.bool:
        masked = torch.zeros_like(bias, dtype=torch.float32)
        return Term(masked.masked_fill_(~bias, float('-inf')))
    return Term(bias if bias.is_floating_point() else bias.float())


def factor_term(factor: Tensor | float) -> Term:
    """Term that multiplies logits by a factor, which broadcasts to their shape."""
    return Term(torch.as_tensor(factor), multiplies=True)


TERMS[added] = _added
TERMS[multiplied] = lambda factor: [factor_term(factor)]
TERMS[multiplied_and_added] = lambda *terms, factor: [factor_term(factor), *_added(*terms)]


class Attention(Operation):
    """``softmax(adjust(q f k^T, *extras)) v`` with quantized operands; holds no state of its own.

    Computed as one operation it saves packed codes of q, k and v only. If a product is float
    or attention weights are dropped, the two products are computed one after the other.

    Args:
        qk_matmul: ``QuantMatMul`` of queries and transposed keys, or a ``FloatMatMul``.
        pv_matmul: The same of probabilities and values.
        adjust: Function applied to the product before the softmax. It may use no tensor of
            the graph except its arguments.
        extras: Its further arguments (bias, mask, factor).
        dropout: Dropout of the attention weights: a probability (0 outside training) or a module.
        query_factor: Factor ``f`` of the queries before they are quantized.
    """

    kind = 'attention'
    scale_factor = 1.0
    """Factor of the scale of the product of queries and keys."""

    def __init__(
        self,
        qk_matmul: Any,
        pv_matmul: Any,
        adjust: Callable[..., Tensor] = added,
        extras: Sequence[Tensor] = (),
        dropout: float | nn.Module = 0.0,
        query_factor: float = 1.0,
    ) -> None:
        self.qk_matmul, self.pv_matmul = qk_matmul, pv_matmul
        self.adjust, self.extras, self.dropout = adjust, extras, dropout
        self.query_factor = query_factor
        self._terms: list[Term] | None = None
        self.engine = getattr(qk_matmul, 'engine', REFERENCE)

    @property
    def refusal(self) -> str:
        """Why the attention cannot be computed as one; empty if it can."""
        if _drops(self.dropout):
            return 'attention weights are dropped'
        if not all(isinstance(m, QuantMatMul) for m in (self.qk_matmul, self.pv_matmul)):
            return 'a rule keeps a product float'
        return ''

    def operands(self) -> dict[str, Operand]:
        """``query``, ``key``, ``probabilities``, ``value``, except those of a float product."""
        names = (('query', 'key'), ('probabilities', 'value'))
        return {
            name: operand
            for own, product in zip(names, (self.qk_matmul, self.pv_matmul), strict=True)
            if isinstance(product, QuantMatMul)
            for name, operand in zip(own, product.operands().values(), strict=True)
        }

    def codes(self, *inputs: Tensor) -> dict[str, Codes]:
        """Codes of q, transposed k, v and of the probabilities computed from them."""
        q, k, v = inputs
        values = {
            'query': self.scaled(q),
            'key': k,
            'probabilities': self.weights(q, k),
            'value': v,
        }
        return {n: Codes(*o.quantizer.codes(values[n])) for n, o in self.operands().items()}

    def macs(self, inputs: Sequence[torch.Size], output: torch.Size) -> int:
        """Quantizers of both products."""
        q, k, _ = inputs
        return (q.numel() + output.numel()) * k[-1]

    def terms(self, q: Tensor) -> list[Term] | None:
        """Steps from the product of queries and keys to logits, found once; None if it has others.

        Args:
            q: Queries, ``(B, heads, N, D)``.
        """
        if self._terms is None:
            self._terms = self._find_terms(q)
        return self._terms

    def _find_terms(self, q: Tensor) -> list[Term] | None:
        if isinstance(self.adjust, partial):
            terms, keywords = TERMS.get(self.adjust.func), self.adjust.keywords
        else:
            terms, keywords = TERMS.get(self.adjust), {}
        return None if terms is None else terms(*self.extras, **keywords)

    def scaled(self, q: Tensor) -> Tensor:
        """Queries ``(..., N, D)`` times ``query_factor``: the operand that is quantized."""
        return q if self.query_factor == 1 else q * self.query_factor

    def logits(self, q: Tensor, k: Tensor, *extras: Tensor) -> Tensor:
        """Input of the softmax ``(..., N, M)``: scaled q, transposed k, extras on their grids."""
        return self.adjust(q @ k, *extras)

    def extras_on_grid(self) -> Sequence[Tensor]:
        """Further arguments of ``logits``, quantized if they are operands."""
        return self.extras

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """Attention weights of q and transposed k, ``(B, heads, N, M)``, with dropout."""
        weights = self.adjust(self.qk_matmul(self.scaled(q), k), *self.extras).softmax(dim=-1)
        if isinstance(self.dropout, nn.Module):
            return self.dropout(weights)
        return F.dropout(weights, self.dropout) if self.dropout > 0 else weights

    def reference(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One product after the other: q ``(B, heads, N, D)``, k ``(B, heads, D, M)``, v values."""
        return self.pv_matmul(self.weights(q, k), v)


def quantized_attention(
    qk_matmul: Any,
    pv_matmul: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    adjust: Callable[..., Tensor],
    extras: Sequence[Tensor] = (),
    dropout: float | nn.Module = 0.0,
    query_factor: float = 1.0,
) -> Tensor:
    """``softmax(adjust(q f k^T, *extras)) v`` with quantized operands.

    Args:
        qk_matmul: See ``Attention``.
        pv_matmul: See ``Attention``.
        q: Queries, ``(B, heads, N, D)``.
        k: Keys, ``(B, heads, M, D)``.
        v: Values, ``(B, heads, M, D')``.
        adjust: See ``Attention``.
        extras: See ``Attention``.
        dropout: See ``Attention``.
        query_factor: See ``Attention``.

    Returns:
        ``(B, heads, N, D')``.
    """
    attention = Attention(qk_matmul, pv_matmul, adjust, extras, dropout, query_factor)
    return compute(attention, q, k.transpose(-2, -1), v)


def _drops(dropout: float | nn.Module) -> bool:
    """Whether attention weights are dropped now; an unknown module counts as dropout."""
    if isinstance(dropout, nn.Dropout):
        return dropout.training and dropout.p > 0
    if isinstance(dropout, nn.Module):
        return not isinstance(dropout, nn.Identity)
    return dropout > 0
