# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Attention on integers in one call: logits and probabilities stay in the processor's cache.

The softmax repeats torch's: its exponential function, its order of sums. Each length of a row is
compared with torch once, and a length that differs is left to torch, product by product.
"""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ....compat.torch import has_hooks, softmax_exponential
from ...attention.products import Term
from ...dispatch import register_backend
from .. import exact
from . import kernels, matmul
from .layer_weight import refusal_of_call

_ROWS_OF_CHECK = 64


def refusal(attention: Any, q: Tensor, k: Tensor, v: Tensor) -> str:
    """Why a call is refused, and its two products are computed apart; empty if it is not."""
    qk, pv = attention.qk_matmul, attention.pv_matmul
    reason = attention.refusal or refusal_of_call(qk, q, k, v) or exact.refusal(pv, v)
    if reason:
        return reason
    if has_hooks((qk, pv)):
        return 'hooks watch the products'
    if q.dim() != 4:
        return 'operands that have not four axes'
    logits = torch.Size((*q.shape[:-1], k.shape[-1]))
    reason = matmul.refusal_of_shapes(qk, q.shape, k.shape)
    reason = reason or matmul.refusal_of_shapes(pv, logits, v.shape)
    if reason:
        return reason
    reason = softmax_differs(logits[-1])
    if reason:
        return reason
    terms = attention.terms(q)
    if terms is None:
        return 'logits that are not products of queries and keys changed by tensors'
    if not all(_fits(term, logits) for term in terms):
        return 'a bias or mask of another type or shape'
    return ''


def _fits(term: Term, logits: torch.Size) -> bool:
    x, shape = term.tensor, (*logits[:-1], *(term.grid or logits[-1:]))
    if x.dtype is not torch.float32 or not x.is_cpu or x.dim() > len(shape):
        return False
    batches, *others = (1,) * (len(shape) - x.dim()) + x.shape
    pairs = zip(others, shape[1:], strict=True)
    return logits[0] % max(batches, 1) == 0 and all(n in (1, size) for n, size in pairs)


def attention(operation: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``operation.reference(q, k, v)``, equal to it bit for bit.

    Args:
        operation: Attention whose quantizers are active.
        q: Queries, ``(B, heads, N, D)``.
        k: Transposed keys, ``(B, heads, D, M)``.
        v: Values, ``(B, heads, M, D')``.

    Returns:
        ``(B, heads, N, D')``; in memory the heads of a token lie side by side.
    """
    (batch, heads, rows, depth), columns, width = q.shape, k.shape[-1], v.shape[-1]
    first = matmul.product_of(operation.qk_matmul, q.shape, q, k)
    shape = torch.Size((batch, heads, rows, columns))
    second = matmul.product_of(operation.pv_matmul, shape, None, v)
    out = torch.empty(batch, rows, heads, width)
    second.product.out, second.product.row_step = out.data_ptr(), heads * width
    terms = operation.terms(q)
    softmax = _softmax(terms, columns)
    status = kernels.loaded().attention(
        *map(ctypes.byref, (first.operands, first.product, second.operands, second.product)),
        ctypes.byref(softmax),
        *map(ctypes.c_float, (operation.query_factor, operation.scale_factor)),
        kernels.threads_for(batch * heads * rows * columns * (depth + width)),
    )
    if not kernels.completed(status):
        return operation.reference(q, k, v)
    return out.transpose(1, 2)


def _softmax(terms: Sequence[Term], columns: int) -> kernels.CSoftmax:
    known = softmax_exponential()
    assert known is not None
    lanes, address = known
    steps = (kernels.CTerm * len(terms))()
    for step, term in zip(steps, terms, strict=True):
        shape = (1, 1, 1, *(term.grid or (1, columns)))
        x = term.tensor
        x = x[(None,) * (len(shape) - (term.grid is None) - x.dim())]
        x = x if term.grid else x.unsqueeze(-2)
        step.x, step.period, step.width = x.data_ptr(), len(x), shape[-1]
        step.multiplies = term.multiplies
        step.outer, step.inner, step.row, step.column_outer, step.column = (
            0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)
        )
    return kernels.CSoftmax(address, lanes, len(terms), steps)


@functools.cache
def softmax_differs(length: int) -> str:
    """Why torch computes the softmax of rows of this length; empty if it need not."""
    if softmax_exponential() is None:
        return "torch's softmax on this processor is not known"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_ROWS_OF_CHECK, length, generator=generator) * 4
    x[1::2, length // 2 + 1 :] = -float('inf')
    room = torch.zeros(_ROWS_OF_CHECK, -(-length // 8) * 8)
    room[:, :length] = x
    kernels.loaded().softmax(
        ctypes.byref(_softmax([], length)),
        kernels.Pointer(room.data_ptr()),
        *map(ctypes.c_int64, (_ROWS_OF_CHECK, length, room.shape[1])),
    )
    if torch.equal(room[:, :length], x.softmax(dim=-1)):
        return ''
    return f"torch's softmax of rows of {length} differs from the kernel's"


register_backend('integer', 'integer', ['attention'], refusal, attention)
