# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Backward passes that raise an error if they are differentiated again."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., Any]


class _Refuse(torch.autograd.Function):
    """Identity on a gradient; its backward pass would be a second derivative and raises."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *sources: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            'a quantizer cannot be differentiated twice: its second derivative is zero almost '
            'everywhere. Take gradient penalties and Hessians of the float model, or call '
            'set_quantization(model, False) for them'
        )


def first_order_only(backward: Backward) -> Backward:
    """Function decorator for ``autograd.Function.backward``: refuse second derivatives.

    The function must call ``ctx.set_materialize_grads(False)``: a missing gradient stays
    None, as in torch's own operators.

    The decorated pass runs without a graph. If a graph is requested (``create_graph=True``)
    and used, a ``RuntimeError`` says what to do instead.
    """

    @wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        if grads[0] is None:
            return (None,) * len(ctx.needs_input_grad)
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        return tuple(g if g is None else _Refuse.apply(g, *_with_graph(ctx, grads)) for g in found)

    return wrapper


def _with_graph(ctx: Any, grads: tuple[Tensor, ...]) -> list[Tensor]:
    """Tensors that a second derivative would depend on."""
    saved = [t for t in ctx.saved_tensors if t is not None]
    return [t for t in (*grads, *saved) if t is not None and t.requires_grad]
