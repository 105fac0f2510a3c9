# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""AdaRound: learns the rounding of one layer by the error of the layer's output.

Source: arXiv 2004.10568, equations 21 to 25. The layer's squared output error is a
quadratic form of the weight error with the Hessian of GPTQ, so that every step uses all
calibration images.
"""

import torch
from torch import Tensor

from ...ops import QuantizedLayer
from ...stream import CallStore, Unit
from ...stream.distributed import broadcast_from_0
from ..algorithms import register_weight_ptq
from ..layer_matrix import CodeProducts
from ..ranges.for_rounding import RANGES, check_range, set_range
from ..task import PTQTask, folded, write_codes, write_nearest
from ..unit_ptq import UnitPTQ, round_to_nearest
from .gptq import GPTQ
from .hessian import output_error
from .soft_rounding import SoftRounding, annealed_beta


@register_weight_ptq('adaround')
class AdaRound(UnitPTQ):
    """Round each weight up or down so that the layer's output changes least.

    An output channel keeps rounding to nearest if that has the smaller error.

    Args:
        steps: Optimizer steps per layer.
        lr: Learning rate.
        regularization: Weight of the term that drives the rounding to 0 or 1.
        range: As for ``gptq``.
        max_columns: As for ``gptq``.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        steps: int = 300,
        lr: float = 5e-2,
        regularization: float = 1.0,
        range: str | None = None,
        max_columns: int = 2048,
    ) -> None:
        check_range('adaround', range, RANGES)
        if steps < 1 or not lr > 0:
            raise ValueError(f'adaround steps={steps!r}, lr={lr!r}: write positive numbers')
        self.steps, self.lr, self.regularization, self.range = steps, lr, regularization, range
        self.max_columns = max_columns

    def quantize_unit(
        self, task: PTQTask, unit: Unit, inputs: CallStore, reference: CallStore | None
    ) -> None:
        """As in the base class: layer by layer, in execution order."""
        products = GPTQ(max_columns=self.max_columns).products
        for name, layer in unit.layers.items():
            if not layer.is_matrix_product:
                task.note(f'{name}: overlapping transposed convolution, rounded to nearest')
                round_to_nearest(task, name)
                continue
            weight = task.float_weights[name]
            if self.range is not None or not layer.weight_quantizer.is_calibrated:
                set_range(layer, weight, self.range or 'mse')
            write_nearest(layer, weight)
            own, _ = products(task, unit, name, inputs, None)
            self._round(layer, weight, own)

    def _round(self, layer: QuantizedLayer, weight: Tensor, own: CodeProducts) -> None:
        target = layer.to_matrix(folded(layer, weight))
        nearest = layer.weight_quantizer.codes(folded(layer, weight))[0].detach()
        before = self._errors(layer, target, own)
        rounding = SoftRounding(layer, weight, learn_scale=False, commitment=0.0)
        hessians = [h.float() for h in own.sums]
        norm = before.sum().clamp_min(1e-12).float()
        optimizer = torch.optim.Adam([rounding.v], lr=self.lr)
        with torch.enable_grad():
            for step in range(self.steps):
                soft = layer.to_matrix(layer.folded_weight(rounding.weight()))
                parts = [
                    output_error(target[..., a:b], soft[..., a:b], h).sum()
                    for h, (a, b) in zip(hessians, own.splits, strict=True)
                ]
                loss = torch.stack(parts).sum() / norm
                if step >= 0.2 * self.steps:
                    beta = annealed_beta(step, self.steps, 0.2, 20, 2)
                    loss = loss + self.regularization * rounding.regularizer(beta)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        rounding.write()
        found = layer.weight_quantizer.codes(folded(layer, layer.weight))[0].detach()
        better = (self._errors(layer, target, own) < before).expand_as(target)
        chosen = torch.where(better, layer.to_matrix(found), layer.to_matrix(nearest))
        write_codes(layer, layer.from_matrix(broadcast_from_0(chosen)).contiguous())

    @torch.no_grad()
    def _errors(self, layer: QuantizedLayer, target: Tensor, own: CodeProducts) -> Tensor:
        """Output error of each row with the layer's current weight, ``(groups, rows, 1)``."""
        rows = layer.to_matrix(folded(layer, layer.weight)).double()
        parts = [
            output_error(target[..., a:b].double(), rows[..., a:b], h)
            for h, (a, b) in zip(own.sums, own.splits, strict=True)
        ]
        return torch.stack(parts).sum(0)
