# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""A product of two quantized activations that saves their packed codes."""

from typing import Any

import torch
from torch import Tensor

from ..quantizers import FakeQuantizer
from ..quantizers.first_order import first_order_only
from ..quantizers.functional import sum_to_shape
from ..quantizers.grid import Grid
from ..quantizers.packed_codes import packed_backward, quantize_packed, unpack_values
from .autocast import autocast_state


def packed_matmul(
    lhs_quantizer: FakeQuantizer, rhs_quantizer: FakeQuantizer, lhs: Tensor, rhs: Tensor
) -> Tensor:
    """``lhs_quantizer(lhs) @ rhs_quantizer(rhs)``; saves the codes of both.

    Args:
        lhs_quantizer: Active quantizer of ``lhs``.
        rhs_quantizer: Active quantizer of ``rhs``.
        lhs: ``(..., N, K)``.
        rhs: ``(..., K, M)``; leading dimensions broadcast.

    Returns:
        ``(..., N, M)``.
    """
    scales, grids = [], []
    for quantizer, x in ((lhs_quantizer, lhs), (rhs_quantizer, rhs)):
        scale, zero_point = quantizer.qparams(x)
        scales.append(scale)
        grids.append(quantizer.grid(zero_point))
    return _PackedMatMul.apply(lhs, rhs, *scales, grids)


class _PackedMatMul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        lhs: Tensor,
        rhs: Tensor,
        lhs_scale: Tensor,
        rhs_scale: Tensor,
        grids: list[Grid],
    ) -> Tensor:
        left, left_packed = quantize_packed(lhs.float(), lhs_scale, grids[0])
        right, right_packed = quantize_packed(rhs.float(), rhs_scale, grids[1])
        ctx.grids, ctx.split, ctx.dtypes = grids, len(left_packed), (lhs.dtype, rhs.dtype)
        ctx.autocast = autocast_state(lhs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(lhs_scale, rhs_scale, *left_packed, *right_packed)
        return left.to(lhs.dtype) @ right.to(rhs.dtype)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        lhs_scale, rhs_scale, *packed = ctx.saved_tensors
        left, right = packed[: ctx.split], packed[ctx.split :]
        with torch.autocast(**ctx.autocast):
            values = unpack_values(right, rhs_scale, ctx.grids[1]).to(ctx.dtypes[1])
            grad_lhs = sum_to_shape(grad @ values.transpose(-2, -1), left[0].shape)
            values = unpack_values(left, lhs_scale, ctx.grids[0]).to(ctx.dtypes[0])
            grad_rhs = sum_to_shape(values.transpose(-2, -1) @ grad, right[0].shape)
        grad_lhs, of_lhs_scale = packed_backward(
            left, grad_lhs, lhs_scale, ctx.grids[0], ctx.needs_input_grad[2]
        )
        grad_rhs, of_rhs_scale = packed_backward(
            right, grad_rhs, rhs_scale, ctx.grids[1], ctx.needs_input_grad[3]
        )
        lhs_dtype, rhs_dtype = ctx.dtypes
        return grad_lhs.to(lhs_dtype), grad_rhs.to(rhs_dtype), of_lhs_scale, of_rhs_scale, None
