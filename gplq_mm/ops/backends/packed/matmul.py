# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""A product of two quantized activations that saves their packed codes."""

from typing import Any

import torch
from torch import Tensor

from ....quantizers.fake_quantizer import PackedForm, quantize_packed
from ....quantizers.first_order import first_order_only
from ....quantizers.functional import sum_to_shape
from ....quantizers.packing.codes import packed_backward, unpack_values
from ...dispatch import register_backend
from .autocast import autocast_state
from .linear import cannot_pack


def refusal(operation: Any, lhs: Tensor, rhs: Tensor) -> str:
    """Why a product is refused; empty if it is computed here."""
    return cannot_pack(operation.quantizers)


def packed_matmul(operation: Any, lhs: Tensor, rhs: Tensor) -> Tensor:
    """``operation.reference(lhs, rhs)``; saves the codes of both.

    Args:
        operation: Matrix product whose quantizers are both active.
        lhs: ``(..., N, K)``.
        rhs: ``(..., K, M)``; leading dimensions broadcast.

    Returns:
        ``(..., N, M)``.
    """
    left, right = operation.quantizers
    forms = left.packed_form(lhs.shape), right.packed_form(rhs.shape)
    return _PackedMatMul.apply(lhs, rhs, left.scale, right.scale, forms)


class _PackedMatMul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        lhs: Tensor,
        rhs: Tensor,
        lhs_scale: Tensor,
        rhs_scale: Tensor,
        forms: tuple[PackedForm, PackedForm],
    ) -> Tensor:
        steps = forms[0].steps(lhs.float(), lhs_scale), forms[1].steps(rhs.float(), rhs_scale)
        left, left_packed = quantize_packed(lhs.float(), *steps[0])
        right, right_packed = quantize_packed(rhs.float(), *steps[1])
        ctx.forms, ctx.split, ctx.dtypes = forms, len(left_packed), (lhs.dtype, rhs.dtype)
        ctx.autocast = autocast_state(lhs)
        ctx.set_materialize_grads(False)
        of_steps = (*forms[0].kept(steps[0]), *forms[1].kept(steps[1]))
        ctx.save_for_backward(lhs_scale, rhs_scale, *of_steps, *left_packed, *right_packed)
        return left.to(lhs.dtype) @ right.to(rhs.dtype)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        lhs_parameter, rhs_parameter, *rest = ctx.saved_tensors
        lhs_steps = ctx.forms[0].kept_steps(rest[:2], lhs_parameter)
        rhs_steps = ctx.forms[1].kept_steps(rest[2:4], rhs_parameter)
        left, right = rest[4 : 4 + ctx.split], rest[4 + ctx.split :]
        with torch.autocast(**ctx.autocast):
            values = unpack_values(right, *rhs_steps).to(ctx.dtypes[1])
            grad_lhs = sum_to_shape(grad @ values.transpose(-2, -1), left[0].shape)
            values = unpack_values(left, *lhs_steps).to(ctx.dtypes[0])
            grad_rhs = sum_to_shape(values.transpose(-2, -1) @ grad, right[0].shape)
        grad_lhs, of_lhs = packed_backward(
            left, grad_lhs, lhs_steps.scale, lhs_steps.grid, ctx.needs_input_grad[2]
        )
        grad_rhs, of_rhs = packed_backward(
            right, grad_rhs, rhs_steps.scale, rhs_steps.grid, ctx.needs_input_grad[3]
        )
        of_scales = (
            ctx.forms[0].gradient(of_lhs, lhs_parameter, lhs_steps.scale),
            ctx.forms[1].gradient(of_rhs, rhs_parameter, rhs_steps.scale),
        )
        return grad_lhs.to(ctx.dtypes[0]), grad_rhs.to(ctx.dtypes[1]), *of_scales, None


register_backend('packed', 'training', ['matmul'], refusal, packed_matmul)
