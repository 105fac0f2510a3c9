# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""ONNX nodes that bring an activation onto the integer grid of its quantizer.

They use true division and round half to even, as the simulation does: a value that is clipped to
the ends of its grid before it is rounded has the same code as one that is clipped after it.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from ...quantizers import FakeQuantizer, PerChannel, PerRow, QuantSpec
from ...quantizers.fake_quantizer import broadcast_shape
from ...quantizers.functional import SCALE_EPS, positive_scale
from ...quantizers.log_codes import thresholds
from .nodes import Nodes, float_array

MAX_BYTE = 255
SPLITTER = np.float32((1 << 23) + 1)
"""Factor of Veltkamp's splitting that leaves one of float32's 24 bits."""
CANDIDATES = 16
"""Neighbouring float32 numbers that ``splitting_factor`` tries."""


class Clipped(NamedTuple):
    """An activation within the range of its grid, not rounded yet.

    Attributes:
        value: Clipped values; ``round(value / step)`` are the centred codes.
        step: Positive number; 1 where the value has been divided by its scale.
        low: Smallest centred code.
        high: Largest centred code.
        scale: Scale of the codes: an array, or a value of the graph.
    """

    value: Any
    step: np.ndarray
    low: int
    high: int
    scale: Any


def centred_bounds(quantizer: FakeQuantizer) -> tuple[int, int]:
    """Smallest and largest centred code that the quantizer can give.

    Examples:
        >>> centred_bounds(FakeQuantizer(QuantSpec(num_bits=4, granularity=PerRow(-1))))
        (-8, 7)
    """
    qmin, qmax = quantizer.spec.quant_range
    if quantizer.follows_rows:
        return (qmin, qmax) if quantizer.spec.symmetric else (qmin - qmax, qmax - qmin)
    zero = quantizer.zero_point
    return qmin - int(zero.max()), qmax - int(zero.min())


def clipped(nodes: Nodes, quantizer: FakeQuantizer, x: Any, ndim: int) -> Clipped:
    """Nodes that clip an activation to the grid of a quantizer with uniform codes.

    Args:
        nodes: Of the operation.
        quantizer: Any granularity.
        x: Value of the graph, float32.
        ndim: Its number of dimensions.
    """
    low, high = centred_bounds(quantizer)
    if quantizer.follows_rows:
        return _clipped_rows(nodes, quantizer, x, low, high)
    scale = float_array(positive_scale(quantizer.scale))
    if not isinstance(quantizer.spec.granularity, PerChannel):
        bounds = (np.float32(k) * scale for k in (low, high))
        return Clipped(nodes('Clip', x, *map(np.asarray, bounds)), scale, low, high, scale)
    shape = broadcast_shape(quantizer.spec.granularity, ndim)
    scale = scale.reshape(shape)
    ratio = nodes('Div', x, scale)
    qmin, qmax = quantizer.spec.quant_range
    zero = float_array(quantizer.zero_point).reshape(shape)
    one = float_array(1.0)
    if len(np.unique(zero)) == 1:
        ratio = nodes('Clip', ratio, float_array(low), float_array(high))
    else:
        ratio = nodes('Max', nodes('Min', ratio, qmax - zero), qmin - zero)
    return Clipped(ratio, one, low, high, scale)


def row_steps(nodes: Nodes, quantizer: FakeQuantizer, x: Any) -> tuple[Any, Any]:
    """Scale of each vector, and the middle of its range (None for symmetric codes).

    The nodes are those of ``row_extent`` and ``row_scale``.
    """
    spec = quantizer.spec
    axis, zero = np.asarray([_row_axis(spec)], np.int64), float_array(0.0)
    high = nodes('Max', nodes('ReduceMax', x, axis, keepdims=1), zero)
    extent, middle = high, None
    if spec.signed or not spec.symmetric:
        low = nodes('Min', nodes('ReduceMin', x, axis, keepdims=1), zero)
        if spec.symmetric:
            extent = nodes('Max', high, nodes('Neg', low))
        else:
            extent = nodes('Sub', high, low)
            middle = nodes('Mul', nodes('Add', high, low), float_array(0.5))
    share = float_array(positive_scale(quantizer.scale))
    return nodes('Max', nodes('Mul', extent, share), float_array(SCALE_EPS)), middle


def _clipped_rows(nodes: Nodes, quantizer: FakeQuantizer, x: Any, low: int, high: int) -> Clipped:
    scale, middle = row_steps(nodes, quantizer, x)
    ratio = nodes('Div', x, scale)
    one = float_array(1.0)
    if middle is None:
        bounds = float_array(low), float_array(high)
        return Clipped(nodes('Clip', ratio, *bounds), one, low, high, scale)
    qmin, qmax = map(float_array, quantizer.spec.quant_range)
    centre = float_array((qmin + qmax) / 2)
    zero = nodes('Round', nodes('Sub', centre, nodes('Div', middle, scale)))
    zero = nodes('Clip', zero, qmin, qmax)
    ratio = nodes('Min', ratio, nodes('Sub', qmax, zero))
    return Clipped(nodes('Max', ratio, nodes('Sub', qmin, zero)), one, low, high, scale)


def _row_axis(spec: QuantSpec) -> int:
    assert isinstance(spec.granularity, PerRow)
    return spec.granularity.axis


def power_of_two(ratio: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """``ratio * factor`` rounded to one significant bit, in float32.

    It is Veltkamp's splitting (T. J. Dekker, 1971) with one bit left: of ``c = (2 ** 23 + 1) * x``
    the difference ``c - (c - x)`` is the power of two next to ``x``.
    """
    x = ratio * factor
    spread = x * SPLITTER
    return spread - (spread - x)


def splitting_factor(levels: np.ndarray) -> np.ndarray | None:
    """Factor with which ``power_of_two`` equals the simulation's search in a table, or None.

    Both ascend with the ratio, so they are equal if they are at every threshold and at the next
    larger number.

    Args:
        levels: Levels, ascending from 0.
    """
    powers = levels[1:].astype(np.float32)
    if (levels[1:] != 1 << np.arange(len(powers))).any():
        return None
    at = thresholds(torch.from_numpy(levels)).numpy()[1:]
    above = np.nextafter(at, np.float32(np.inf), dtype=np.float32)
    factor = np.float32(1.5 / np.sqrt(2))
    for _ in range(CANDIDATES // 2):
        factor = np.nextafter(factor, np.float32(0), dtype=np.float32)
    for _ in range(CANDIDATES):
        factor = np.nextafter(factor, np.float32(2), dtype=np.float32)
        low, high = power_of_two(at, factor), power_of_two(above, factor)
        if (low == powers / 2).all() and (high == powers).all():
            return np.asarray(factor)
    return None


def log_levels_of(nodes: Nodes, quantizer: FakeQuantizer, x: Any) -> tuple[list[Any], Any]:
    """Nodes that give the levels of a logarithmic code as bytes.

    Args:
        nodes: Of the operation.
        quantizer: With logarithmic codes; scale per tensor, per head or per row.
        x: Value of the graph, float32, from 0 on.

    Returns:
        ``(digits, scale)``: uint8 values, one or two; the level is ``digits[0]``, or
        ``256 * digits[1] + digits[0]``.
    """
    ratio, scale = _log_ratio(nodes, quantizer, x)
    levels = quantizer.levels.cpu().numpy().astype(np.int64)
    is_wide = levels.max() > MAX_BYTE
    factor = splitting_factor(levels)
    if factor is None:
        steps = thresholds(quantizer.levels.cpu())[1:]
        above = [nodes('Cast', nodes('Greater', ratio, float_array(t)), to=1) for t in steps]
        index = nodes('Cast', nodes('Sum', *above), to=6)
        tables = [levels % 256, levels // 256] if is_wide else [levels]
        return [nodes('Gather', table.astype(np.uint8), index) for table in tables], scale
    power = _split(nodes, ratio, factor, levels)
    low = nodes('Cast', nodes('Cast', power, to=6), to=2)  # drops the higher byte
    if not is_wide:
        return [low], scale
    # 128 / 256 is rounded to the even 0, so this is the higher byte
    return [low, nodes('QuantizeLinear', power, float_array(256), np.asarray(0, np.uint8))], scale


def log_power(nodes: Nodes, quantizer: FakeQuantizer, x: Any) -> tuple[Any, Any]:
    """Nodes that give the levels of a logarithmic code as float32, before rounding.

    Args:
        nodes: Of the operation.
        quantizer: With logarithmic codes.
        x: Value of the graph, float32, from 0 on.

    Returns:
        ``(level, scale)``; what lies below the smallest level is at most 0.5.
    """
    ratio, scale = _log_ratio(nodes, quantizer, x)
    levels = quantizer.levels.cpu().numpy().astype(np.int64)
    factor = splitting_factor(levels)
    if factor is not None:
        return _split(nodes, ratio, factor, levels), scale
    steps, rise = thresholds(quantizer.levels.cpu())[1:], np.diff(levels)
    above = [nodes('Cast', nodes('Greater', ratio, float_array(t)), to=1) for t in steps]
    parts = [nodes('Mul', a, float_array(r)) for a, r in zip(above, rise, strict=True)]
    return nodes('Sum', *parts), scale


def _split(nodes: Nodes, ratio: Any, factor: np.ndarray, levels: np.ndarray) -> Any:
    """Nodes of ``power_of_two``, up to the largest level."""
    value = nodes('Mul', ratio, factor)
    spread = nodes('Mul', value, np.asarray(SPLITTER))
    power = nodes('Sub', spread, nodes('Sub', spread, value))
    return nodes('Min', power, float_array(levels.max()))


def _log_ratio(nodes: Nodes, quantizer: FakeQuantizer, x: Any) -> tuple[Any, Any]:
    if quantizer.follows_rows:
        scale, _ = row_steps(nodes, quantizer, x)
    else:
        scale = float_array(positive_scale(quantizer.scale))
        if isinstance(quantizer.spec.granularity, PerChannel):
            scale = scale.reshape(broadcast_shape(quantizer.spec.granularity, 4))
    return nodes('Div', x, scale), scale
