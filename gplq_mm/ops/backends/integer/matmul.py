# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Products of two activations on integers, as in attention."""

import ctypes
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ....compat.torch import version_of
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
_KEPT: 'WeakKeyDictionary[FakeQuantizer, tuple[Any, Constants]]' = WeakKeyDictionary()


def refusal(operation: Any, lhs: Tensor, rhs: Tensor) -> str:
    """Why a call is refused; empty if it is computed here."""
    reason = refusal_of_call(operation, lhs, rhs)
    if reason:
        return reason
    if lhs.shape[:-2] != rhs.shape[:-2] or lhs.dim() < 2 or not (lhs.numel() and rhs.numel()):
        return 'leading axes that broadcast, or an empty operand'
    if lhs.shape[-1] != rhs.shape[-2]:
        return SHAPES_DO_NOT_FIT
    if operation.rhs_quantizer.spec.is_log:
        return 'logarithmic codes of the right operand'
    per_channel = any(isinstance(q.spec.granularity, PerChannel) for q in operation.quantizers)
    if per_channel and lhs.dim() != 4:
        return 'scales along an axis of operands that have not four axes'
    form = _layout(operation, lhs.shape[-1])
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
    left, right = operation.quantizers
    form = _layout(operation, lhs.shape[-1])
    assert isinstance(form, kernels.Layout)
    x, y = _two_batch_axes(lhs), _two_batch_axes(rhs)
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = y if 1 in (y.stride(-1), y.stride(-2)) else y.contiguous()
    (rows, depth), columns = x.shape[-2:], y.shape[-1]
    out = torch.empty(*lhs.shape[:-2], rows, columns)
    constants = _constants(left), _constants(right)
    operands = kernels.COperands(*x.shape[:2], depth, constants[0].side, constants[1].side)
    alive = (
        _fill(operands.lhs, constants[0], left, x, -2),
        _fill(operands.rhs, constants[1], right, y, -1),
    )
    product = kernels.CProduct(rows, columns, form.groups, form.wide, form.flush)
    product.out, product.row_step, product.column_step = out.data_ptr(), columns, 1
    threads = kernels.threads_for(out.numel() * depth)
    status = kernels.loaded().matmul(ctypes.byref(operands), ctypes.byref(product), threads)
    del alive  # scales that C reads
    if not kernels.completed(status):
        return exact.matmul(operation, lhs, rhs)
    return out


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
    key = [None if t is None else (t.data_ptr(), version_of(t)) for t in state]
    kept = _KEPT.get(quantizer)
    if kept is None or kept[0] != key:
        kept = key, _read(quantizer)
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
    side: kernels.CSide, constants: Constants, quantizer: FakeQuantizer, x: Tensor, vectors: int
) -> tuple[Tensor, ...]:
    """Set pointers and strides of an operand whose vectors lie along axis ``vectors``.

    Returns:
        Tensors that C reads.
    """
    side.x = x.data_ptr()
    side.outer, side.inner, side.row, side.column = x.stride()
    if quantizer.follows_rows or constants.scale.numel() == constants.zero.numel() == 1:
        return (x,)
    granularity = quantizer.spec.granularity
    shape = (*x.shape[:2], x.shape[vectors])
    over = broadcast_shape(granularity, x.dim())
    scale, zero = (
        t.view(over).squeeze(-1 if vectors == -2 else -2).expand(shape).contiguous()
        for t in (constants.scale, constants.zero.expand(constants.scale.shape))
    )
    side.scale, side.zero = scale.data_ptr(), zero.data_ptr()
    side.scale_batch = side.zero_batch = shape[2]
    side.scale_step = side.zero_step = 1
    return x, scale, zero


register_backend('integer', 'integer', ['matmul'], refusal, matmul)
