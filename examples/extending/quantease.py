# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""QuantEase (arXiv 2309.01885, algorithm 1): cyclic coordinate descent on the weights' codes."""

import torch
from torch import Tensor

from gplq_mm.ptq import (
    CodeProducts,
    PTQTask,
    UnitPTQ,
    folded,
    layer_codes,
    register_weight_ptq,
    round_to_nearest,
    write_codes,
)
from gplq_mm.stream import CallStore, Unit, all_reduce_sum, broadcast_from_0


@register_weight_ptq('quantease')
class QuantEase(UnitPTQ):
    """Round to nearest, then give one column after another its best codes given all others.

    Args:
        sweeps: How often every column is visited.

    Raises:
        ValueError: If ``sweeps`` is not a positive integer.
    """

    def __init__(self, sweeps: int = 4) -> None:
        if not isinstance(sweeps, int) or sweeps < 1:
            raise ValueError(f'quantease sweeps={sweeps!r}: write a positive integer, e.g. 4')
        self.sweeps = sweeps

    @torch.no_grad()
    def quantize_unit(
        self, task: PTQTask, unit: Unit, inputs: CallStore, reference: CallStore | None
    ) -> None:
        """Layer by layer, in the order in which they run."""
        for name, layer in unit.layers.items():
            round_to_nearest(task, name)
            if not layer.is_matrix_product:
                task.note(f'{name}: overlapping transposed convolution, rounded to nearest')
                continue
            weight = folded(layer, task.float_weights[name])
            codes, scale = layer.codes()['weight']
            _, zero_point = layer.weight_quantizer.qparams(weight)
            tensors = [t.expand_as(weight) for t in (weight, codes, scale, zero_point)]
            rows, codes, scale, zero_point = (layer.to_matrix(t).double() for t in tensors)
            low, high = (q - zero_point for q in layer.weight_quantizer.spec.quant_range)
            hessian = input_products(unit, name, inputs)
            gradient = (rows - codes * scale) @ hessian
            for column in list(range(rows.shape[2])) * self.sweeps:
                one = slice(column, column + 1)
                curvature = hessian[:, one, one]
                best = codes[..., one] + gradient[..., one] / (curvature * scale[..., one])
                best = best.round().clamp(low[..., one], high[..., one])
                best = torch.where(curvature > 0, best, codes[..., one])
                gradient -= (best - codes[..., one]) * scale[..., one] * hessian[:, one]
                codes[..., one] = best
            write_codes(layer, layer.from_matrix(broadcast_from_0(codes).to(weight.dtype)))


def input_products(unit: Unit, name: str, inputs: CallStore) -> Tensor:
    """``X X^T`` of a layer's input codes on all images, ``(groups, columns, columns)``."""
    layer = unit.layers[name]
    columns = layer.to_matrix(layer.weight).shape[2]
    products = CodeProducts(layer, [(0, columns)], layer.weight.device)
    for index in range(len(inputs)):
        for codes in layer_codes(unit, name, inputs, index):
            for part in layer.input_columns(codes):
                products.add(part, part)
    all_reduce_sum(products.sums[0])
    return products.sums[0]
