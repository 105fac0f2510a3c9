# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""A layer's weight, scales and zero points as the integer kernels read them."""

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ....compat.torch import TensorState
from ....quantizers.functional import positive_scale
from .. import exact
from . import kernels
from .kernels import CGrid, RightMatrix


class LayerWeight(NamedTuple):
    """Constant part of a layer's integer product.

    Attributes:
        matrix: Codes of the weight.
        factor: Factor of the integer sum per column of ``matrix``, float32.
        scale: Scale of the input, ``()`` or one per channel.
        zero: Zero point of the input, ``()`` or one per channel.
        grid: ``scale``, ``zero`` and range of the codes, for C.
    """

    matrix: RightMatrix
    factor: Tensor
    scale: Tensor
    zero: Tensor
    grid: CGrid


Arrange = Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor, int]]
"""``arrange(layer, codes, zero)``: codes of the weight ``(columns, depth)``, the input's zero
points ``(depth,)``, and how many columns share an output channel."""

SHAPES_DO_NOT_FIT = "shapes that do not fit: torch's own error follows"
_KEPT: 'WeakKeyDictionary[Any, tuple[TensorState, LayerWeight | str]]' = WeakKeyDictionary()


def refusal_of_call(operation: Any, x: Tensor, *others: Tensor | None) -> str:
    """Why settings or inputs rule integers out; empty if they do not."""
    compiled, description = kernels.load()
    if compiled is None:
        return description
    if torch.compiler.is_compiling():
        return 'torch.compile does not trace C'
    for given in (x, *others):
        if given is not None and not (given.is_cpu and given.dtype is torch.float32):
            return f'{given.dtype} on {given.device}; the kernels take float32 on a CPU'
    return exact.refusal(operation, x)


def layer_weight(layer: Any, arrange: Arrange) -> LayerWeight | str:
    """The arranged weight of a layer, or the reason that it has none.

    Args:
        layer: Layer with calibrated quantizers.
        arrange: Order of the weight's codes.
    """
    of_input, of_weight = layer.quantizers
    own = (
        *(of_input.scale, of_input.zero_point, of_weight.scale, of_weight.zero_point),
        layer.weight,
    )
    kept = _KEPT.get(layer)
    if kept is None or not kept[0].matches(*own):
        kept = TensorState(*own), _arranged(layer, arrange)
        _KEPT[layer] = kept
    return kept[1]


def accepted_weight(layer: Any, arrange: Arrange) -> LayerWeight:
    """The weight that ``layer_weight`` has just found usable."""
    kept = _KEPT.get(layer)
    weight = layer_weight(layer, arrange) if kept is None else kept[1]
    assert isinstance(weight, LayerWeight)
    return weight


def _arranged(layer: Any, arrange: Arrange) -> LayerWeight | str:
    quantizer = layer.input_quantizer
    if quantizer.follows_rows or quantizer.spec.is_log:
        return 'an input with a scale per row or logarithmic codes'
    qmin, qmax = quantizer.spec.quant_range
    scale = positive_scale(quantizer.scale.detach()).float().contiguous()
    zero = quantizer.zero_point.detach().float().contiguous()
    if not bool(((zero >= qmin) & (zero <= qmax)).all()):
        return 'a zero point outside the codes'
    codes, weight_scale = layer.codes()['weight']
    if not bool(torch.isfinite(codes).all()):
        return 'a weight that is not finite'
    rows, zeros, repeat = arrange(layer, codes, zero)
    form = kernels.layout(qmax - qmin, int(codes.abs().max()), rows.shape[1])
    if isinstance(form, str):
        return form
    matrix = kernels.loaded().arrange(rows, zeros - qmin, form)
    factor = layer.output_scale(weight_scale, scale).flatten().expand(matrix.columns // repeat)
    factor = factor.repeat_interleave(repeat).float().contiguous()
    scale, zero = (t.contiguous() for t in torch.broadcast_tensors(scale, zero))
    grid = CGrid(scale.data_ptr(), zero.data_ptr(), int(scale.numel() > 1), qmin, qmax)
    return LayerWeight(matrix, factor, scale, zero, grid)
