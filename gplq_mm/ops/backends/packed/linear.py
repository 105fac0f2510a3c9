# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""A layer that saves the packed codes of its input for the backward pass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ....compat.torch import own_tensor
from ....quantizers import FakeQuantizer
from ....quantizers.fake_quantizer import PackedForm, quantize_packed
from ....quantizers.first_order import first_order_only
from ....quantizers.packing.codes import packed_backward, unpack_values
from ...dispatch import not_quantized, register_backend


def refusal(layer: Any, x: Tensor, bias: Tensor | None) -> str:
    """Why a call of a layer is refused; empty if it is computed here."""
    reason = cannot_pack([layer.input_quantizer])
    if reason:
        return reason
    if not layer.can_pack:
        return 'its padding is other than a number of zeros'
    tensors = (x, layer.input_quantizer.scale, layer.weight, bias)
    needed = any(t is not None and t.requires_grad for t in tensors)
    return '' if needed else 'no tensor needs a gradient'


def cannot_pack(saved: Sequence[FakeQuantizer], recomputed: Sequence[FakeQuantizer] = ()) -> str:
    """Why the codes of some operands cannot be packed now; empty if they can.

    Args:
        saved: Quantizers of the operands whose codes are saved.
        recomputed: Quantizers of the operands that the backward pass recomputes.
    """
    if any(q.spec.is_log for q in saved):
        return 'logarithmic codes have no rounding residual'
    return not_quantized((*saved, *recomputed))


def packed_linear(layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """``layer.reference(x, bias)``; saves the packed codes of ``x``, and the weight unpacked.

    Args:
        layer: Layer with an active input quantizer.
        x: Layer input: tokens ``(..., C)``, or maps ``(B, C, H, W)``.
        bias: Added to the output, ``(out_channels,)``, or None.
    """
    quantizer, weight = layer.input_quantizer, layer.effective_weight()
    form = quantizer.packed_form(x.shape)
    dtype = None
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    return _PackedLinear.apply(x, quantizer.scale, weight, bias, form, layer, dtype)


class _PackedLinear(torch.autograd.Function):
    """Casts itself instead of autocast, whose cache must not hold weights without a graph."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        form: PackedForm,
        layer: Any,
        autocast: torch.dtype | None,
    ) -> Tensor:
        steps = form.steps(x.float(), scale)
        values, packed = quantize_packed(x.float(), *steps)
        ctx.form, ctx.layer, ctx.dtypes = form, layer, (x.dtype, autocast)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(scale, weight, *form.kept(steps), *packed)
        with torch.autocast(x.device.type, enabled=False):
            dtype = autocast or x.dtype
            inputs = values.to(dtype), _cast(weight, autocast), _cast(bias, autocast)
            del values
            return own_tensor(layer.product(*inputs))

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parameter, weight, *rest = ctx.saved_tensors
        form, packed = ctx.form, rest[2:]
        steps = form.kept_steps(rest[:2], parameter)
        x_dtype, autocast = ctx.dtypes
        of_x, of_scale, of_weight, of_bias = ctx.needs_input_grad[:4]
        grad_x = grad_scale = grad_weight = grad_bias = None
        with torch.autocast(grad.device.type, enabled=False):
            if of_bias:
                grad_bias = _sum_over_outputs(grad, ctx.layer.channel_axis)
            values = unpack_values(packed, *steps).to(autocast or x_dtype)
            grad_values, grad_weight = ctx.layer.product_gradients(
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
        grad_scale = form.gradient(grad_scale, parameter, steps.scale)
        return grad_x, grad_scale, grad_weight, grad_bias, None, None, None


def _cast(x: Tensor | None, dtype: torch.dtype | None) -> Any:
    return x if x is None or dtype is None else x.to(dtype)


def _sum_over_outputs(grad: Tensor, channel_axis: int) -> Tensor:
    """Gradient of the bias, ``(channels,)``, float32."""
    dims = [d for d in range(grad.dim()) if d != grad.dim() + channel_axis]
    return grad.float().sum(dims) if dims else grad.float()


register_backend('packed', 'training', ['linear', 'conv'], refusal, packed_linear)
