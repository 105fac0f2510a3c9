# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Products of two activations on integers, as in attention."""

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ....compat.torch import TensorState
from ....quantizers import FakeQuantizer, PerChannel
from ....quantizers.fake_quantizer import broadcast_shape
from ....quantizers.functional import positive_scale
from ....quantizers.log_codes import thresholds
from ...dispatch import register_backend
from .. import exact
from . import kernels
from .layer_weight import SHAPES_DO_NOT_FIT, refusal_of_call


class Constants(NamedTuple):
    """What a quantizer's setting gives the kernels, apart from the operand.

    Attributes:
        side: Range, levels and how scales arise; pointers and strides are missing.
        scale: Scale, kept alive for C, ``()`` or ``(size,)``.
        zero: Zero point, same shape.
        levels: Table of a logarithmic code and its thresholds, else None.
    """

    side: kernels.CSide
    scale: Tensor
    zero: Tensor
    levels: tuple[Tensor, Tensor] | None


_GIVEN, _ASYMMETRIC, _SYMMETRIC, _FROM_ZERO = range(4)
"""``Extent`` of the C file."""
_KEPT: 'WeakKeyDictionary[FakeQuantizer, tuple[TensorState, Constants]]' = WeakKeyDictionary()


def refusal(operation: Any, lhs: Tensor, rhs: Tensor) -> str:
    """Why a call is refused; empty if it is computed here."""
    return refusal_of_call(operation, lhs, rhs) or refusal_of_shapes(
        operation, lhs.shape, rhs.shape
    )


def refusal_of_shapes(operation: Any, lhs: torch.Size, rhs: torch.Size) -> str:
    """Why a product of operands of these shapes is refused; empty if it is computed here."""
    if lhs[:-2] != rhs[:-2] or len(lhs) < 2 or 0 in (*lhs, *rhs):
        return 'leading axes that broadcast, or an empty operand'
    if lhs[-1] != rhs[-2]:
        return SHAPES_DO_NOT_FIT
    if operation.rhs_quantizer.spec.is_log:
        return 'logarithmic codes of the right operand'
    per_channel = any(isinstance(q.spec.granularity, PerChannel) for q in operation.quantizers)
    if per_channel and len(lhs) != 4:
        return 'scales along an axis of operands that have not four axes'
    form = _layout(operation, lhs[-1])
    return form if isinstance(form, str) else ''


def _layout(operation: Any, depth: int) -> kernels.Layout | str:
    left, right = operation.quantizers
    if left.spec.is_log:
        largest = exact.max_code(left)
    else:
        qmin, qmax = left.spec.quant_range
        largest = qmax - qmin
    form = kernels.layout(largest, exact.max_code(right), depth)
    if left.spec.is_log and isinstance(form, kernels.Layout) and not form.wide:
        return kernels.Layout(1, -(-depth // 2), 1)  # levels are read as 16 bits
    return form


def matmul(operation: Any, lhs: Tensor, rhs: Tensor) -> Tensor:
    """``operation.reference(lhs, rhs)``, equal to ``exact.matmul`` bit for bit.

    Args:
        operation: Product whose quantizers are active.
        lhs: ``(..., N, K)``.
        rhs: ``(..., K, M)``, same leading axes.

    Returns:
        ``(..., N, M)``.
    """
    out = torch.empty(*lhs.shape[:-1], rhs.shape[-1])
    call = product_of(operation, lhs.shape, lhs, rhs)
    call.product.out, call.product.row_step = out.data_ptr(), out.shape[-1]
    threads = kernels.threads_for(out.numel() * lhs.shape[-1])
    status = kernels.loaded().matmul(
        ctypes.byref(call.operands), ctypes.byref(call.product), threads
    )
    if not kernels.completed(status):
        return exact.matmul(operation, lhs, rhs)
    return out


class Call(NamedTuple):
    """Arguments of a product for C; the output is missing.

    Attributes:
        operands: Both operands.
        product: Shape and layout.
        alive: Tensors that C reads.
    """

    operands: kernels.COperands
    product: kernels.CProduct
    alive: tuple[Any, ...]


def product_of(operation: Any, shape: torch.Size, lhs: Tensor | None, rhs: Tensor) -> Call:
    """Arguments of a product.

    Args:
        operation: Product whose quantizers are active.
        shape: Shape of the left operand, ``(..., N, K)``.
        lhs: Left operand; None if C computes it.
        rhs: ``(..., K, M)``.
    """
    left, right = operation.quantizers
    depth = shape[-1]
    form = _layout(operation, depth)
    assert isinstance(form, kernels.Layout)
    y = _two_batch_axes(rhs)
    y = y if 1 in (y.stride(-1), y.stride(-2)) else y.contiguous()
    constants = _constants(left), _constants(right)
    operands = kernels.COperands(*y.shape[:2], depth, constants[0].side, constants[1].side)
    alive = [constants, _fill(operands.rhs, constants[1], right, y, -1)]
    if lhs is None:
        four = (*y.shape[:2], *shape[-2:])
        alive.append(_fill_scales(operands.lhs, constants[0], left, four, -2))
    else:
        x = _two_batch_axes(lhs)
        x = x if x.stride(-1) == 1 else x.contiguous()
        alive.append(_fill(operands.lhs, constants[0], left, x, -2))
    product = kernels.CProduct(shape[-2], y.shape[-1], form.groups, form.wide, form.flush)
    product.column_step = 1
    return Call(operands, product, tuple(alive))


def _two_batch_axes(x: Tensor) -> Tensor:
    """``x`` with four axes."""
    if x.dim() == 4:
        return x
    if x.dim() > 4:
        return x.flatten(0, -4)
    return x[(None,) * (4 - x.dim())]


def _constants(quantizer: FakeQuantizer) -> Constants:
    state = (
        quantizer.scale,
        quantizer.zero_point,
        quantizer.levels if quantizer.spec.is_log else None,
    )
    kept = _KEPT.get(quantizer)
    if kept is None or not kept[0].matches(*state):
        kept = TensorState(*state), _read(quantizer)
        _KEPT[quantizer] = kept
    return kept[1]


def _read(quantizer: FakeQuantizer) -> Constants:
    spec = quantizer.spec
    scale = positive_scale(quantizer.scale.detach()).float().contiguous()
    zero = quantizer.zero_point.detach().float().contiguous()
    side = kernels.CSide(scale=scale.data_ptr(), zero=zero.data_ptr())
    side.qmin, side.qmax = spec.quant_range
    if quantizer.follows_rows:
        side.share = float(scale)
        side.extent = _ASYMMETRIC
        if spec.symmetric:
            side.extent = _SYMMETRIC if spec.signed else _FROM_ZERO
    levels = None
    if spec.is_log:
        levels = quantizer.levels.float(), thresholds(quantizer.levels)
        side.levels, side.thresholds = (t.data_ptr() for t in levels)
        side.num_levels = len(levels[0])
    return Constants(side, scale, zero, levels)


def _fill(
    side: kernels.CSide, constants: Constants, quantizer: FakeQuantizer, x: Tensor, axis: int
) -> tuple[Tensor, ...]:
    """Set pointers and strides of an operand whose vectors lie along ``axis``.

    Returns:
        Tensors that C reads.
    """
    side.x = x.data_ptr()
    side.outer, side.inner, side.row, side.column = x.stride()
    return x, *_fill_scales(side, constants, quantizer, x.shape, axis)


def _fill_scales(
    side: kernels.CSide,
    constants: Constants,
    quantizer: FakeQuantizer,
    shape: Sequence[int],
    axis: int,
) -> tuple[Tensor, ...]:
    if quantizer.follows_rows or constants.scale.numel() == constants.zero.numel() == 1:
        return ()
    over = broadcast_shape(quantizer.spec.granularity, len(shape))
    scale, zero = (
        t.view(over).squeeze(-1 if axis == -2 else -2).expand(*shape[:2], shape[axis]).contiguous()
        for t in (constants.scale, constants.zero.expand(constants.scale.shape))
    )
    side.scale, side.zero = scale.data_ptr(), zero.data_ptr()
    side.scale_batch = side.zero_batch = shape[axis]
    side.scale_step = side.zero_step = 1
    return scale, zero


register_backend('integer', 'integer', ['matmul'], refusal, matmul)
