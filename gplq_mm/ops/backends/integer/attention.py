# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Attention on integers in one call: logits and probabilities stay in the processor's cache.

The softmax repeats torch's: its exponential function, its order of sums. Each length of a row is
compared with torch once, and a length that differs is left to torch, product by product.
"""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from ....compat.torch import has_hooks, softmax_exponential
from ...attention.products import TERMS, Attention, Term
from ...dispatch import register_backend
from .. import exact
from . import kernels, matmul
from .layer_weight import refusal_of_call

_ROWS_OF_CHECK = 64


def refusal(attention: Any, q: Tensor, k: Tensor, v: Tensor) -> str:
    """Why a call is refused, and its two products are computed apart; empty if it is not."""
    if type(attention) is not Attention or attention.adjust not in TERMS:
        return 'logits that are not products of queries and keys changed by tensors'
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
    for term in TERMS[attention.adjust](*attention.extras):
        if not _fits(term.tensor, logits):
            return 'a bias or mask of another type or shape'
    return softmax_differs(logits[-1])


def _fits(term: Tensor, logits: torch.Size) -> bool:
    if term.dtype is not torch.float32 or not term.is_cpu or term.dim() > 4:
        return False
    batches, *others = (1,) * (4 - term.dim()) + term.shape
    pairs = zip(others, logits[1:], strict=True)
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
    terms = TERMS[operation.adjust](*operation.extras)
    softmax = _softmax(terms)
    status = kernels.loaded().attention(
        *map(ctypes.byref, (first.operands, first.product, second.operands, second.product)),
        ctypes.byref(softmax),
        ctypes.c_float(operation.query_factor),
        kernels.threads_for(batch * heads * rows * columns * (depth + width)),
    )
    if not kernels.completed(status):
        return operation.reference(q, k, v)
    return out.transpose(1, 2)


def _softmax(terms: list[Term]) -> kernels.CSoftmax:
    known = softmax_exponential()
    assert known is not None
    lanes, address = known
    steps = (kernels.CTerm * len(terms))()
    for step, term in zip(steps, terms, strict=True):
        four = term.tensor[(None,) * (4 - term.tensor.dim())]
        step.x, step.period, step.multiplies = four.data_ptr(), len(four), term.multiplies
        step.outer, step.inner, step.row, step.column = (
            0 if size == 1 else stride
            for size, stride in zip(four.shape, four.stride(), strict=True)
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
        ctypes.byref(_softmax([])),
        kernels.Pointer(room.data_ptr()),
        *map(ctypes.c_int64, (_ROWS_OF_CHECK, length, room.shape[1])),
    )
    if torch.equal(room[:, :length], x.softmax(dim=-1)):
        return ''
    return f"torch's softmax of rows of {length} differs from the kernel's"


register_backend('integer', 'integer', ['attention'], refusal, attention)
