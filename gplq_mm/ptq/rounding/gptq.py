# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""GPTQ: rounds column by column; the columns not yet rounded compensate each error.

Source: arXiv 2210.17323, algorithm 1; the target of ``asymmetric`` is that of
arXiv 2504.02692 (GPTAQ), equation 5, in closed form; ``guided`` is arXiv 2505.07004.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops import QuantizedLayer
from ...stream import CallStore, Unit
from ...stream.distributed import all_reduce_sum, broadcast_from_0
from ...stream.unit_stream import layer_inputs
from ..algorithms import register_weight_ptq
from ..layer_matrix import (
    CodeProducts,
    column_splits,
    rows_of_qparams,
)
from ..ranges.for_rounding import RANGES, check_range, set_range
from ..task import PTQTask, folded, write_codes
from ..unit_ptq import UnitPTQ, codes_of, round_to_nearest
from .guidance import TokenWeights
from .hessian import damped, output_error, stable_cholesky
from .stage1_target import Target, image_numbers

_BLOCK = 128


@register_weight_ptq('gptq')
class GPTQ(UnitPTQ):
    """Rounding that minimises the error of each layer's output, ``|| (W - W^) X ||^2``.

    X are the layer's input codes in the model whose earlier layers are quantized, so the
    Hessian X X^T is an exact sum of integers. A per-channel input scale is folded into W.
    A transposed convolution with overlapping kernels is not a matrix product: it is rounded
    to nearest, with a note.

    Args:
        range: ``mse``, ``percentile``, ``minmax``, or ``hessian`` for the squared error
            weighted by the Hessian's diagonal; None keeps the scale of an earlier algorithm,
            or is ``mse`` without one.
        damping: Added to the diagonal, relative to its mean.
        act_order: Round the columns with the largest inputs first.
        asymmetric: Fit the output of the stage-1 model on its own inputs, so that a layer
            also compensates errors of earlier layers, as far as this generalises to images
            outside the fit (``Target``); False fits the output of the float layer on the
            quantized model's inputs.
        max_columns: Most columns of a Hessian; wider layers are split.
        guided: Exponent of a token's squared feature gradient, its weight in the Hessian of a
            linear layer (``TokenWeights``); 0 for equal weights. It needs the memory of
            training with one calibration batch.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        range: str | None = None,
        damping: float = 0.01,
        act_order: bool = True,
        asymmetric: bool = False,
        max_columns: int = 2048,
        guided: float = 0.0,
    ) -> None:
        check_range('gptq', range, (*RANGES, 'hessian'))
        if not damping >= 0 or max_columns < 1:
            raise ValueError(
                f'gptq damping={damping!r}, max_columns={max_columns!r}: write a damping of at '
                'least 0, e.g. 0.01, and at least one column'
            )
        if not 0 <= guided <= 1:
            raise ValueError(f'gptq guided={guided!r}: write a power from 0 to 1, e.g. 0.5')
        self.range, self.damping, self.act_order = range, damping, act_order
        self.asymmetric, self.max_columns, self.guided = asymmetric, max_columns, guided
        self.needs_reference = asymmetric
        self._guidance: TokenWeights | None = None

    def options(self) -> dict[str, Any]:
        """As in the base class; without ``guided`` if it is 0, as in folders of older versions."""
        found = super().options()
        return found if self.guided else {k: v for k, v in found.items() if k != 'guided'}

    def begin(self, task: PTQTask, units: Sequence[Unit]) -> None:
        """Compute the token weights, with the weights of stage 1."""
        self._guidance = None
        if self.guided:
            with task.stage1():
                self._guidance = TokenWeights(task, units, self.guided)

    @torch.no_grad()
    def quantize_unit(
        self, task: PTQTask, unit: Unit, inputs: CallStore, reference: CallStore | None
    ) -> None:
        """As in the base class: layer by layer, in execution order."""
        for name, layer in unit.layers.items():
            if not layer.is_matrix_product:
                task.note(f'{name}: overlapping transposed convolution, rounded to nearest')
                round_to_nearest(task, name)
                continue
            sums = self.products(task, unit, name, inputs, reference)
            self.quantize_layer(layer, task.float_weights[name], *sums)

    def products(
        self,
        task: PTQTask,
        unit: Unit,
        name: str,
        inputs: CallStore,
        reference: CallStore | None,
    ) -> tuple[CodeProducts, list[Target]]:
        """Sums of ``q q^T``, and with a reference a target for each column range."""
        layer = unit.layers[name]
        device = layer.weight.device
        splits = column_splits(layer.to_matrix(layer.weight).shape[2], self.max_columns)
        # a target needs separate sums for two halves of the images, to check each on the other
        own = [CodeProducts(layer, splits, device) for _ in range(2 if reference else 1)]
        cross = [CodeProducts(layer, splits, device) for _ in range(2 if reference else 0)]
        call = 0
        for index, number in enumerate(image_numbers(inputs)):
            codes = layer_codes(unit, name, inputs, index)
            target_codes = codes
            if reference is not None:
                with task.stage1():
                    target_codes = layer_codes(unit, name, reference, index)
            half = number % len(own)
            for q, p in zip(codes, target_codes, strict=True):
                levels = self._levels(name, call, q)
                call += 1
                for left, right in zip(layer.input_columns(q), layer.input_columns(p), strict=True):
                    own[half].add(left, left, levels)
                    if cross:
                        cross[half].add(right - left, left, levels)
        for products in (*own, *cross):
            for total in products.sums:
                all_reduce_sum(total)
        targets = [
            Target([o.sums[i] for o in own], [c.sums[i] for c in cross])
            for i in range(len(splits) if cross else 0)
        ]
        return own[0].plus(own[1:]), targets

    def _levels(self, name: str, call: int, codes: Tensor) -> Tensor | None:
        if self._guidance is None:
            return None
        return self._guidance.of_call(name, call, codes.numel() // codes.shape[-1])

    @torch.no_grad()
    def quantize_layer(
        self,
        layer: QuantizedLayer,
        weight: Tensor,
        own: CodeProducts,
        targets: list[Target],
    ) -> None:
        """Quantize one layer.

        Args:
            layer: The layer; an existing range is kept if ``range`` is None.
            weight: Float weight, not folded, shape of the layer's.
            own: Products of its input codes.
            targets: Target of each column range; empty for the float weight.
        """
        rows = layer.to_matrix(folded(layer, weight)).double()
        for index, target in enumerate(targets):
            a, b = own.splits[index]
            rows[..., a:b] = target.retargeted(rows[..., a:b], self.damping)
        if targets:
            rows = broadcast_from_0(rows)
            weight = layer.unfolded_weight(layer.from_matrix(rows).to(weight.dtype)).contiguous()
        quantizer = layer.weight_quantizer
        if self.range is not None or not quantizer.is_calibrated:
            diagonal = torch.cat([h.diagonal(dim1=1, dim2=2) for h in own.sums], 1)  # (G, K)
            importance = layer.from_matrix(diagonal[:, None].expand(rows.shape).float())
            set_range(layer, weight, self.range or 'mse', importance)
        scale, zero = quantizer.qparams(weight)
        scale, zero = (rows_of_qparams(layer, t).double() for t in (scale, zero))
        grid = (scale, zero, quantizer.spec.quant_range)
        codes = torch.empty_like(rows)
        for index, (a, b) in enumerate(own.splits):
            part, hessian = rows[..., a:b], damped(own.sums[index], self.damping)
            found = gptq_codes(part, hessian, *grid, self.act_order)
            codes[..., a:b] = not_worse(part, found, own.sums[index], *grid)
        codes = broadcast_from_0(codes)
        write_codes(layer, layer.from_matrix(codes).to(weight.dtype).contiguous())


def gptq_codes(
    rows: Tensor,
    hessian: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_range: tuple[int, int],
    act_order: bool = False,
) -> Tensor:
    """Centred codes of weight rows.

    Args:
        rows: ``(groups, rows, columns)``, float64.
        hessian: ``(groups, columns, columns)``, damped.
        scale: ``(groups, rows, 1)``.
        zero_point: Same shape.
        quant_range: ``(qmin, qmax)``.
        act_order: Columns in descending order of the Hessian's diagonal.

    Returns:
        Same shape as ``rows``.
    """
    if act_order:
        order = hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
        inverse_order = order.argsort(dim=1)
        hessian = hessian.gather(1, order[:, :, None].expand_as(hessian))
        hessian = hessian.gather(2, order[:, None].expand_as(hessian))
        rows = rows.gather(2, order[:, None].expand_as(rows))
    inverse = torch.cholesky_inverse(stable_cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    left, codes = rows.clone(), torch.empty_like(rows)
    for start in range(0, rows.shape[2], _BLOCK):
        end = min(start + _BLOCK, rows.shape[2])
        errors = torch.empty_like(rows[..., start:end])
        for i in range(start, end):
            column = left[..., i : i + 1]
            code = nearest_codes(column, scale, zero_point, quant_range)
            error = (column - code * scale) / factor[:, i : i + 1, i : i + 1]
            left[..., i:end] -= error * factor[:, i : i + 1, i:end]
            codes[..., i : i + 1] = code
            errors[..., i - start : i - start + 1] = error
        left[..., end:] -= errors @ factor[:, start:end, end:]
    return codes.gather(2, inverse_order[:, None].expand_as(codes)) if act_order else codes


def nearest_codes(
    rows: Tensor, scale: Tensor, zero_point: Tensor, quant_range: tuple[int, int]
) -> Tensor:
    """Centred codes by rounding to nearest; arguments as in ``gptq_codes``."""
    low, high = quant_range[0] - zero_point, quant_range[1] - zero_point
    return torch.minimum(torch.maximum(torch.round(rows / scale), low), high)


def not_worse(
    rows: Tensor,
    codes: Tensor,
    hessian: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_range: tuple[int, int],
) -> Tensor:
    """``codes``, with rows rounded to nearest where that has the smaller output error.

    Arguments as in ``gptq_codes``; ``codes`` has the shape of ``rows``.
    """
    nearest = nearest_codes(rows, scale, zero_point, quant_range)
    error, plain = (output_error(rows, c * scale, hessian) for c in (codes, nearest))
    return torch.where(error <= plain, codes, nearest)


def layer_codes(unit: Unit, name: str, inputs: CallStore, index: int) -> list[Tensor]:
    """Input codes of a layer in one call of its unit, one tensor per call of the layer."""
    layer = unit.layers[name]
    caught = layer_inputs(unit, [name], inputs[index])[name]
    return [codes_of(layer, x) for x in caught]
