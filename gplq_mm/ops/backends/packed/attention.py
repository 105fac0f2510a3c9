# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Attention that saves the packed codes of q, k and v only.

The backward pass recomputes logits, probabilities and their codes exactly.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ....quantizers.fake_quantizer import quantize_packed, quantize_values
from ....quantizers.first_order import first_order_only
from ....quantizers.packing.codes import packed_backward, softmax_backward, unpack_values
from ...dispatch import register_backend
from .autocast import autocast_state
from .linear import cannot_pack

Logits = Callable[..., Tensor]
_SAVED = (0, 1, 3)
"""Positions of q, k and v among the quantizers."""


def refusal(attention: Any, *inputs: Tensor) -> str:
    """Why an attention is refused: its two products are then computed one after the other."""
    if attention.refusal:
        return attention.refusal
    q, k, probabilities, v = attention.quantizers
    return cannot_pack([q, k, v], [probabilities])


def packed_attention(attention: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``attention.reference(q, k, v)``: ``quantize(softmax(logits(q, k, ...))) @ quantize(v)``.

    Args:
        attention: The backward pass calls its ``logits`` again; its ``extras`` are saved
            unpacked and get gradients.
        q: Queries, ``(B, heads, N, D)``.
        k: Transposed keys, ``(B, heads, D, M)``.
        v: Values, ``(B, heads, M, D')``.

    Returns:
        ``(B, heads, N, D')``.
    """
    q = attention.scaled(q)
    shapes = (q.shape, k.shape, torch.Size((*q.shape[:-1], k.shape[-1])), v.shape)
    quantizers = attention.quantizers
    forms = [x.packed_form(shape) for x, shape in zip(quantizers, shapes, strict=True)]
    scales = [quantizer.scale for quantizer in quantizers]
    extras = attention.extras_on_grid()
    return _PackedAttention.apply(q, k, v, *scales, attention.logits, forms, *extras)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        parameters, (logits, forms), extras = rest[:4], rest[4:6], rest[6:]
        values: list[Tensor] = []
        packed: list[Tensor] = []
        of_steps: list[Tensor | None] = []
        ends = [10]
        for x, index in zip((q, k, v), _SAVED, strict=True):
            steps = forms[index].steps(x.float(), parameters[index])
            on_grid, codes = quantize_packed(x.float(), *steps)
            values.append(on_grid.to(x.dtype))
            packed += codes
            of_steps += forms[index].kept(steps)
            ends.append(10 + len(packed))
        ctx.logits, ctx.forms, ctx.dtypes = logits, forms, (q.dtype, k.dtype, v.dtype)
        ctx.autocast = autocast_state(q)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*parameters, *of_steps, *packed, *extras)
        ctx.ends = ends
        weights = logits(values[0], values[1], *extras).softmax(dim=-1)
        on_grid = quantize_values(weights.float(), *forms[2].steps(weights.float(), parameters[2]))
        return on_grid.to(weights.dtype) @ values[2]

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        parameters, extras = saved[:4], saved[ctx.ends[-1] :]
        steps = {
            i: ctx.forms[i].kept_steps(saved[4 + 2 * n : 6 + 2 * n], parameters[i])
            for n, i in enumerate(_SAVED)
        }
        codes = {i: saved[ctx.ends[n] : ctx.ends[n + 1]] for n, i in enumerate(_SAVED)}
        needs_grad = ctx.needs_input_grad[9:]
        with torch.autocast(**ctx.autocast):
            q, k, v = (
                unpack_values(codes[i], *steps[i]).to(dtype)
                for i, dtype in zip(_SAVED, ctx.dtypes, strict=True)
            )
            logits, back = _logits_with_graph(ctx.logits, q, k, extras, needs_grad)
            weights = logits.softmax(dim=-1)
            steps[2] = ctx.forms[2].steps(weights.float(), parameters[2])
            on_grid = quantize_values(weights.float(), *steps[2])
            grad = grad.contiguous()
            grad_v = on_grid.to(weights.dtype).transpose(-2, -1) @ grad
            del on_grid
            grad_logits, grad_scale = softmax_backward(
                weights.float(),
                grad @ v.transpose(-2, -1),
                steps[2].scale,
                steps[2].grid,
                ctx.needs_input_grad[5],
            )
            del weights, logits
            grad_q, grad_k, *grad_extras = back(grad_logits)
        grads, grad_scales = [], {2: grad_scale}
        for i, grad_x, dtype in zip(_SAVED, (grad_q, grad_k, grad_v), ctx.dtypes, strict=True):
            grad_x, grad_scales[i] = packed_backward(
                codes[i], grad_x, steps[i].scale, steps[i].grid, ctx.needs_input_grad[3 + i]
            )
            grads.append(grad_x.to(dtype))
        of_scales = [
            o.gradient(grad_scales[i], parameters[i], steps[i].scale)
            for i, o in enumerate(ctx.forms)
        ]
        return (*grads, *of_scales, None, None, *grad_extras)


def _logits_with_graph(
    logits: Logits, q: Tensor, k: Tensor, extras: Sequence[Tensor], needs_grad: Sequence[bool]
) -> tuple[Tensor, Callable[[Tensor], list[Any]]]:
    """Logits, and the function that maps their gradient to those of q, k and the extras."""
    inputs = [q.requires_grad_(), k.requires_grad_()]
    inputs += [x.detach().requires_grad_(want) for x, want in zip(extras, needs_grad, strict=True)]
    with torch.enable_grad():
        out = logits(*inputs)

    def back(grad: Tensor) -> list[Any]:
        targets = [x for x in inputs if x.requires_grad]
        found = iter(torch.autograd.grad(out, targets, grad.to(out.dtype)))
        return [next(found) if x.requires_grad else None for x in inputs]

    return out.detach(), back


register_backend('packed', 'training', ['attention'], refusal, packed_attention)
