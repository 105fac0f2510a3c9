# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Feed-forward network that saves only the packed codes of its input.

The backward pass recomputes the hidden tensors, four times as large as the input. It costs
one more product of the first layer and saves 4/16 of the memory of a float block.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....compat.torch import own_tensor
from ....quantizers.fake_quantizer import PackedForm, quantize_packed, quantize_values
from ....quantizers.first_order import first_order_only
from ....quantizers.packing.codes import packed_backward, unpack_values
from ...dispatch import register_backend
from .autocast import autocast_state
from .linear import cannot_pack


def refusal(network: Any, x: Tensor) -> str:
    """Why a network is refused: its modules are then called one by one."""
    if network.engine.ffn != 'recompute':
        return "engine.ffn='layers'"
    if network.refusal:
        return network.refusal
    return cannot_pack([network.first.input_quantizer, network.second.input_quantizer])


def recomputed_ffn(network: Any, x: Tensor) -> Tensor:
    """``network.reference(x)`` for tokens ``(..., C)``; saves the packed codes of ``x``."""
    first, act, second = network.first, network.act, network.second
    hidden = torch.Size((*x.shape[:-1], first.out_features))
    forms = first.input_quantizer.packed_form(x.shape), second.input_quantizer.packed_form(hidden)
    return _RecomputedFFN.apply(
        x,
        first.input_quantizer.scale,
        first.effective_weight(),
        first.bias,
        second.input_quantizer.scale,
        second.effective_weight(),
        second.bias,
        act,
        forms,
    )


class _RecomputedFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        first: Tensor,
        first_weight: Tensor,
        first_bias: Tensor | None,
        second: Tensor,
        second_weight: Tensor,
        second_bias: Tensor | None,
        act: nn.Module,
        forms: tuple[PackedForm, PackedForm],
    ) -> Tensor:
        steps = forms[0].steps(x.float(), first)
        values, packed = quantize_packed(x.float(), *steps)
        ctx.act, ctx.forms, ctx.dtype, ctx.autocast = act, forms, x.dtype, autocast_state(x)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            first,
            first_weight,
            first_bias,
            second,
            second_weight,
            *forms[0].kept(steps),
            *packed,
        )
        with torch.autocast(**ctx.autocast):
            hidden = act(F.linear(values.to(x.dtype), first_weight, first_bias))
            on_grid = quantize_values(hidden.float(), *forms[1].steps(hidden.float(), second))
            on_grid = on_grid.to(hidden.dtype)
            del hidden
            return own_tensor(F.linear(on_grid, second_weight, second_bias))

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        first, first_weight, first_bias, second, second_weight, *rest = ctx.saved_tensors
        of_first, of_second = ctx.forms
        first_steps, packed = of_first.kept_steps(rest[:2], first), rest[2:]
        needs = ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * 9
        with torch.autocast(**ctx.autocast):
            x = unpack_values(packed, *first_steps).to(ctx.dtype)
            before = F.linear(x, first_weight, first_bias).requires_grad_()
            with torch.enable_grad():
                hidden = ctx.act(before.clone() if getattr(ctx.act, 'inplace', False) else before)
            second_steps = of_second.steps(hidden.detach().float(), second)
            on_grid, codes = quantize_packed(hidden.detach().float(), *second_steps)
            grads[5], grads[6] = _of_parameters(grad, on_grid.to(hidden.dtype), needs[5], needs[6])
            del on_grid
            grad, grads[4] = packed_backward(
                codes, grad @ second_weight, second_steps.scale, second_steps.grid, needs[4]
            )
            del codes
            (grad,) = torch.autograd.grad(hidden, before, grad.to(hidden.dtype))
            del hidden, before
            grads[2], grads[3] = _of_parameters(grad, x, needs[2], needs[3])
            if needs[0] or needs[1]:
                grad_x = grad @ first_weight
                del grad
                grads[0], grads[1] = packed_backward(
                    packed, grad_x, first_steps.scale, first_steps.grid, needs[1]
                )
        grads[1] = of_first.gradient(grads[1], first, first_steps.scale)
        grads[4] = of_second.gradient(grads[4], second, second_steps.scale)
        return tuple(grads)


def _of_parameters(
    grad: Tensor, x: Tensor, of_weight: bool, of_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a linear layer's weight and bias."""
    rows = grad.reshape(-1, grad.shape[-1])
    weight = rows.t() @ x.reshape(-1, x.shape[-1]) if of_weight else None
    return weight, rows.float().sum(0) if of_bias else None


register_backend('packed', 'training', ['ffn'], refusal, recomputed_ffn)
