# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""A linear operation with a quantized input that saves packed codes of the input."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..compat.torch import own_tensor
from ..quantizers import FakeQuantizer
from ..quantizers.first_order import first_order_only
from ..quantizers.grid import Operand
from ..quantizers.packed_codes import packed_backward, quantize_packed, unpack_values

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Gradients = Callable[[Tensor, Tensor, Tensor, bool, bool], tuple[Tensor | None, Tensor | None]]


class LinearOperation(NamedTuple):
    """A layer's arithmetic.

    Attributes:
        product: ``product(x, weight, bias)``.
        gradients: ``gradients(grad, x, weight, of_x, of_weight)``, each None where the
            flag is False.
        channel_axis: Axis of the output that the bias runs along.
    """

    product: Product
    gradients: Gradients
    channel_axis: int


def packed_product(
    operation: LinearOperation,
    quantizer: FakeQuantizer,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """``operation.product(quantizer(x), weight, bias)``; saves the codes of ``x`` only.

    Args:
        operation: The layer's arithmetic.
        quantizer: Active quantizer of ``x``.
        x: Layer input.
        weight: Weight as it is multiplied, saved as it is.
        bias: Added to the output, or None.
    """
    operand = quantizer.operand(x.shape)
    dtype = None
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    return _PackedProduct.apply(x, quantizer.scale, weight, bias, operand, operation, dtype)


class _PackedProduct(torch.autograd.Function):
    """Autocast is carried out by hand: its cache must not see weights without a graph."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        operand: Operand,
        operation: LinearOperation,
        autocast: torch.dtype | None,
    ) -> Tensor:
        steps = operand.steps(x.float(), scale)
        values, packed = quantize_packed(x.float(), *steps)
        ctx.operand, ctx.operation, ctx.dtypes = operand, operation, (x.dtype, autocast)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(scale, weight, *operand.kept(steps), *packed)
        with torch.autocast(x.device.type, enabled=False):
            dtype = autocast or x.dtype
            operands = values.to(dtype), _cast(weight, autocast), _cast(bias, autocast)
            del values
            return own_tensor(operation.product(*operands))

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parameter, weight, *rest = ctx.saved_tensors
        operand, packed = ctx.operand, rest[2:]
        steps = operand.kept_steps(rest[:2], parameter)
        x_dtype, autocast = ctx.dtypes
        of_x, of_scale, of_weight, of_bias = ctx.needs_input_grad[:4]
        grad_x = grad_scale = grad_weight = grad_bias = None
        with torch.autocast(grad.device.type, enabled=False):
            if of_bias:
                grad_bias = _sum_over_outputs(grad, ctx.operation.channel_axis)
            values = unpack_values(packed, *steps).to(autocast or x_dtype)
            grad_values, grad_weight = ctx.operation.gradients(
                grad, values, _cast(weight, autocast), of_x or of_scale, of_weight
            )
            del values
            if grad_values is not None:
                grad_x, grad_scale = packed_backward(
                    packed, grad_values, steps.scale, steps.grid, of_scale
                )
                grad_x = grad_x.to(x_dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        grad_scale = operand.gradient(grad_scale, parameter, steps.scale)
        return grad_x, grad_scale, grad_weight, grad_bias, None, None, None


def _cast(x: Tensor | None, dtype: torch.dtype | None) -> Any:
    return x if x is None or dtype is None else x.to(dtype)


def _sum_over_outputs(grad: Tensor, channel_axis: int) -> Tensor:
    """Gradient of the bias, ``(channels,)``, float32."""
    dims = [d for d in range(grad.dim()) if d != grad.dim() + channel_axis]
    return grad.float().sum(dims) if dims else grad.float()
