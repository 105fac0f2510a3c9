# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Feed-forward network that saves the packed codes of its input only.

The hidden tensors, four times as large as the input, are computed again in the backward
pass: one more product of the first layer for 4/16 of what a float block saves.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compat.torch import has_hooks, own_tensor
from ..quantizers.first_order import first_order_only
from ..quantizers.grid import Operand
from ..quantizers.packed_codes import (
    packed_backward,
    quantize_packed,
    quantize_values,
    unpack_values,
)
from .autocast import autocast_state
from .engine import EngineUser, packs
from .linear import QuantLinear

ACTIVATIONS = (nn.GELU, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.LeakyReLU)
"""Activation functions without parameters, state or randomness."""


class FeedForward(EngineUser):
    """Mixin for modules of two layers with an activation function between them."""

    def recomputed(
        self, x: Tensor, first: Any, act: nn.Module, drops: Sequence[nn.Module], second: Any
    ) -> Tensor | None:
        """``second(drops(act(first(x))))`` with a backward pass that computes it again.

        Args:
            x: ``(..., C)``.
            first: First layer.
            act: Activation function.
            drops: What stands between it and the second layer.
            second: Second layer.

        Returns:
            ``(..., C')``; None where the modules are to be called one by one: for another
            engine or setting, in evaluation and calibration, where something is float or
            drops elements, and where hooks want to see the calls.
        """
        if self.engine.ffn != 'recompute' or not _can_recompute(first, act, drops, second):
            return None
        quantizers = (first.input_quantizer, second.input_quantizer)
        if not packs(self.engine, *quantizers):
            return None
        return recomputed_ffn(first, act, second, x)


class SequentialFeedForward(FeedForward):
    """Mixin for ``Sequential(Sequential(Linear, act, drop), Linear, drop)`` of mmcv's FFN."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """``(..., C)`` -> same."""
        parts = list(self)
        if len(parts) >= 2 and isinstance(parts[0], nn.Sequential) and len(parts[0]) >= 2:
            (first, act, *drops), second, *rest = parts
            out = self.recomputed(x, first, act, drops, second)
            if out is not None:
                for module in rest:
                    out = module(out)
                return out
        return super().forward(x)  # type: ignore[misc]


class MlpFeedForward(FeedForward):
    """Mixin for modules with ``fc1``, ``act``, ``fc2`` and perhaps ``drop`` at the end."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """``(..., C)`` -> same."""
        out = self.recomputed(x, self.fc1, self.act, (), self.fc2)
        if out is None:
            return super().forward(x)  # type: ignore[misc]
        return self.drop(out) if hasattr(self, 'drop') else out


def recomputed_ffn(first: Any, act: nn.Module, second: Any, x: Tensor) -> Tensor:
    """``second(act(first(x)))`` of two quantized layers; saves the packed codes of ``x``."""
    hidden = torch.Size((*x.shape[:-1], first.out_features))
    operands = first.input_quantizer.operand(x.shape), second.input_quantizer.operand(hidden)
    return _RecomputedFFN.apply(
        x,
        first.input_quantizer.scale,
        first.effective_weight(),
        first.bias,
        second.input_quantizer.scale,
        second.effective_weight(),
        second.bias,
        act,
        operands,
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
        operands: tuple[Operand, Operand],
    ) -> Tensor:
        steps = operands[0].steps(x.float(), first)
        values, packed = quantize_packed(x.float(), *steps)
        ctx.act, ctx.operands, ctx.dtype, ctx.autocast = act, operands, x.dtype, autocast_state(x)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            first,
            first_weight,
            first_bias,
            second,
            second_weight,
            *operands[0].kept(steps),
            *packed,
        )
        with torch.autocast(**ctx.autocast):
            hidden = act(F.linear(values.to(x.dtype), first_weight, first_bias))
            on_grid = quantize_values(hidden.float(), *operands[1].steps(hidden.float(), second))
            on_grid = on_grid.to(hidden.dtype)
            del hidden
            return own_tensor(F.linear(on_grid, second_weight, second_bias))

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        first, first_weight, first_bias, second, second_weight, *rest = ctx.saved_tensors
        of_first, of_second = ctx.operands
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


def _can_recompute(first: Any, act: nn.Module, drops: Sequence[nn.Module], second: Any) -> bool:
    """Whether these modules are what ``recomputed_ffn`` computes, and nobody watches them."""
    layers = isinstance(first, QuantLinear) and isinstance(second, QuantLinear)
    if not layers or type(act) not in ACTIVATIONS:
        return False
    if not all(_is_identity(drop) for drop in drops):
        return False
    return not has_hooks((first, act, *drops, second))


def _is_identity(module: nn.Module) -> bool:
    if isinstance(module, nn.Dropout):
        return module.p == 0 or not module.training
    return isinstance(module, nn.Identity)
