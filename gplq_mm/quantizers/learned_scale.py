# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Learned step size: gradients of codes and values with respect to input and scale.

Source: LSQ (arXiv 1902.08153), equations 1 to 3; with a fixed zero point the
formulas hold for asymmetric ranges too (LSQ+, arXiv 2004.09576).
"""

from typing import Any

import torch
from torch import Tensor

from .first_order import first_order_only
from .functional import positive_scale, sum_to_shape
from .log_codes import quantize_to_levels, upper_bound


def _inside(ratio: Tensor, zero_point: Tensor, qmin: int, qmax: int, slack: float = 0.0) -> Tensor:
    """LSQ's in-range mask: the bounds apply to ``x / s`` before it is rounded.

    Args:
        ratio: ``x / s``.
        zero_point: Code of real zero.
        qmin: Smallest code.
        qmax: Largest code.
        slack: Steps by which the bounds are widened, see ``Grid``.
    """
    return (ratio > qmin - zero_point - slack) & (ratio < qmax - zero_point + slack)


def _traceable(result: Tensor) -> Tensor:
    """A view of the result for ``torch.compile``, which drops gradients of in-place results."""
    return result.view_as(result) if torch.compiler.is_compiling() else result


class _CenteredCodes(torch.autograd.Function):
    """``clamp(round(x / s) + z, qmin, qmax) - z`` with straight-through rounding.

    In range: d/dx = 1/s and d/ds = -x/s^2; out of range both are 0. Together with
    the product rule this makes ``codes * s`` carry exactly LSQ's gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        qmin: int,
        qmax: int,
        slack: float,
    ) -> Tensor:
        ratio = x / scale
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, scale, _inside(ratio, zero_point, qmin, qmax, slack))
        codes = ratio.round_().add_(zero_point).clamp_(qmin, qmax).sub_(zero_point)
        return _traceable(codes)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, inside = ctx.saved_tensors
        grad_x = torch.where(inside, grad / scale, 0.0)
        grad_scale = None
        if ctx.needs_input_grad[1]:
            grad_scale = sum_to_shape(-grad_x * x / scale, scale.shape)
        return grad_x, grad_scale, None, None, None, None


class _FakeQuantize(torch.autograd.Function):
    """Dequantized values with LSQ's gradients in one graph node."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        qmin: int,
        qmax: int,
        slack: float,
    ) -> Tensor:
        ctx.bounds = (qmin, qmax, slack)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, scale, zero_point)
        codes = (x / scale).round_().add_(zero_point).clamp_(qmin, qmax).sub_(zero_point)
        return _traceable(codes.mul_(scale))

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        qmin, qmax, slack = ctx.bounds
        ratio = x / scale
        inside = _inside(ratio, zero_point, qmin, qmax, slack)
        grad_x = grad * inside
        grad_scale = None
        if ctx.needs_input_grad[1]:
            # in range: round(x/s) - x/s; outside: the bound itself
            codes = torch.round(ratio).add_(zero_point).clamp_(qmin, qmax)
            slope = codes.sub_(zero_point).sub_(ratio.mul_(inside))
            grad_scale = sum_to_shape(slope.mul_(grad), scale.shape)
        return grad_x, grad_scale, None, None, None, None


class _LevelCodes(torch.autograd.Function):
    """Levels of ``x / s`` in a table of integers, with straight-through rounding.

    In range: d/dx = 1/s and d/ds = -x/s^2; above it both are 0.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
        ratio = x / scale
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, scale, ratio < upper_bound(levels))
        return _traceable(quantize_to_levels(ratio, levels))

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, inside = ctx.saved_tensors
        grad_x = torch.where(inside, grad / scale, 0.0)
        grad_scale = None
        if ctx.needs_input_grad[1]:
            grad_scale = sum_to_shape(-grad_x * x / scale, scale.shape)
        return grad_x, grad_scale, None


class _PositiveScale(torch.autograd.Function):
    """``max(scale, SCALE_EPS)`` with a straight-through gradient: a scale can grow again."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor) -> Tensor:
        return positive_scale(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _ScaledGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def centered_codes_ste(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, slack: float = 0.0
) -> Tensor:
    """Centred integer codes of ``x``, differentiable (straight-through).

    Args:
        x: Real values, any shape.
        scale: Positive step size, broadcastable to ``x``.
        zero_point: Code of real zero, broadcastable to ``x``.
        qmin: Smallest code.
        qmax: Largest code.
        slack: Steps by which the range with gradients is wider than that of the codes.

    Returns:
        ``code - zero_point``, shape of ``x``.

    Examples:
        >>> s, z = torch.tensor(0.5, requires_grad=True), torch.tensor(0.0)
        >>> x = torch.tensor([0.6, 9.0], requires_grad=True)
        >>> codes = centered_codes_ste(x, s, z, -8, 7)
        >>> (codes * s).sum().backward()
        >>> x.grad, s.grad  # 1 - 0.6/0.5 in range, 7 above
        (tensor([1., 0.]), tensor(6.8000))
    """
    return _CenteredCodes.apply(x, scale, zero_point, qmin, qmax, slack)


def level_codes_ste(x: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    """Integer levels of ``x / scale`` (``log_codes``), differentiable (straight-through).

    Args:
        x: Real values from 0 on, any shape.
        scale: Positive, broadcastable to ``x``.
        levels: Table of integers, ascending from 0.

    Examples:
        >>> level_codes_ste(torch.tensor([0.3, 0.1]), torch.tensor(0.1), torch.tensor([0, 1, 2, 4]))
        tensor([4., 1.])
    """
    return _LevelCodes.apply(x, scale, levels)


def fake_quantize_ste(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, slack: float = 0.0
) -> Tensor:
    """Dequantized values of ``x`` with LSQ's gradients; arguments as in ``centered_codes_ste``.

    Examples:
        >>> s, z = torch.tensor(0.5, requires_grad=True), torch.tensor(0.0)
        >>> fake_quantize_ste(torch.tensor([0.6, 9.0]), s, z, -8, 7)
        tensor([0.5000, 3.5000], grad_fn=<_FakeQuantizeBackward>)
    """
    return _FakeQuantize.apply(x, scale, zero_point, qmin, qmax, slack)


def positive_scale_ste(scale: Tensor) -> Tensor:
    """Scale of any shape, at least ``SCALE_EPS``, with a straight-through gradient."""
    return _PositiveScale.apply(scale)


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Identity on any shape in the forward pass; multiplies the gradient by ``factor``."""
    return _ScaledGradient.apply(x, factor)
