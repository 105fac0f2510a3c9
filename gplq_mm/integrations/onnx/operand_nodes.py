# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""ONNX nodes that bring an activation onto the integer grid of its quantizer.

All divide truly and round half to even, as the simulation does: a value that is clipped to the ends
of its grid before it is rounded has the same code as one that is clipped after it.
"""

from typing import Any, NamedTuple

import numpy as np

from ...quantizers import FakeQuantizer, PerChannel, PerRow, QuantSpec
from ...quantizers.fake_quantizer import broadcast_shape
from ...quantizers.functional import SCALE_EPS, positive_scale
from ...quantizers.log_codes import thresholds
from .nodes import Nodes, float_array


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


def log_table(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Levels by rounded-up ratio, for tables of powers of two.

    ``levels_by_count[min(ceil(ratio / unit), last)]`` is the level of a ratio. This equals the
    simulation's search if it does at every threshold and at the next larger number, since both
    functions ascend; where it does not, or for another base, there is no such table.

    Args:
        levels: Levels, ascending from 0.

    Returns:
        ``(unit, levels_by_count)``: float32 and int64, or None.
    """
    steps = thresholds(_as_tensor(levels)).numpy()[1:]
    powers = levels[1:]
    if (powers != 1 << np.arange(len(powers))).any():
        return None
    unit = np.asarray(steps[0], np.float32)
    above = np.nextafter(steps, np.float32(np.inf), dtype=np.float32)
    exact = (steps / unit <= powers).all() and (above / unit > powers).all()
    if not exact:
        return None
    count = np.arange(int(powers[-1]) + 2)
    return unit, levels[np.searchsorted(powers, count, side='left')]


def log_levels_of(nodes: Nodes, quantizer: FakeQuantizer, x: Any) -> tuple[list[Any], Any]:
    """Nodes that give the levels of a logarithmic code as bytes.

    Args:
        nodes: Of the operation.
        quantizer: With logarithmic codes; scale per tensor or per row.
        x: Value of the graph, float32, from 0 on.

    Returns:
        ``(digits, scale)``: uint8 values, one or two; the level is ``digits[0]``, or
        ``128 * digits[1] + digits[0]``.
    """
    if quantizer.follows_rows:
        scale, _ = row_steps(nodes, quantizer, x)
    else:
        scale = float_array(positive_scale(quantizer.scale))
        if isinstance(quantizer.spec.granularity, PerChannel):
            scale = scale.reshape(broadcast_shape(quantizer.spec.granularity, 4))
    ratio = nodes('Div', x, scale)
    levels = quantizer.levels.cpu().numpy().astype(np.int64)
    by_count = log_table(levels)
    if by_count is not None:
        unit, levels = by_count
        count = nodes('Ceil', nodes('Div', ratio, unit))
        index = nodes('Clip', count, float_array(0.0), float_array(len(levels) - 1))
    else:
        above = [
            nodes('Cast', nodes('Greater', ratio, float_array(t)), to=1)
            for t in thresholds(quantizer.levels.cpu())[1:]
        ]
        index = nodes('Sum', *above)
    index = nodes('Cast', index, to=6)
    tables = [levels % 128, levels // 128] if levels.max() > 255 else [levels]
    return [nodes('Gather', table.astype(np.uint8), index) for table in tables], scale


def _as_tensor(levels: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(levels)
