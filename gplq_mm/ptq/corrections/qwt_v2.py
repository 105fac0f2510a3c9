# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Channel-wise affine compensation, folded: no side branch and no additional operation.

Source: the idea of QwT (arXiv 2411.13918) with a diagonal instead of a full matrix, as in
QwT-v2. Factor and shift of an output channel are folded into the channel's weight scale and
its bias; the integer codes do not change.
"""

from typing import ClassVar

import torch

from ...quantizers import PerTensor
from ...stream import CallStore, Unit
from ..algorithms import register_weight_ptq
from ..task import CORRECTS, PTQTask, folded, write_codes
from ..unit_ptq import UnitPTQ
from .output_statistics import OutputMoments


@register_weight_ptq('qwt_v2')
class QwTv2(UnitPTQ):
    """Fit each layer's stage-1 output by its quantized output, least squares per channel.

    Put it after an algorithm that rounds: ``ptq=['gptq', 'qwt_v2']``. Without a bias it fits
    only the factor; with one weight scale for all channels only the shift.

    Args:
        largest: A channel with a factor outside ``1 / largest`` to ``largest`` keeps its
            scale.

    Raises:
        ValueError: If ``largest`` is not above 1.
    """

    needs_reference = True
    phase: ClassVar[str] = CORRECTS

    def __init__(self, largest: float = 2.0) -> None:
        if not largest > 1:
            raise ValueError(f'qwt_v2 largest={largest!r}: write a number above 1, e.g. 2.0')
        self.largest = largest

    @torch.no_grad()
    def quantize_unit(
        self, task: PTQTask, unit: Unit, inputs: CallStore, reference: CallStore | None
    ) -> None:
        """As in the base class: layer by layer, in execution order."""
        for name, layer in unit.layers.items():
            found = OutputMoments(task, unit, name, inputs, reference)
            quantizer, count = layer.weight_quantizer, found.count.clamp_min(1)
            centre = torch.zeros_like(count) if layer.bias is None else found.output / count
            spread = found.output_squared - centre * found.output
            common = found.product - centre * found.target
            factor = common / torch.where(spread > 0, spread, 1.0)
            usable = (factor > 1 / self.largest) & (factor < self.largest) & (spread > 0)
            if isinstance(quantizer.spec.granularity, PerTensor):
                usable = torch.zeros_like(usable)
            factor = torch.where(usable, factor, 1.0).float()
            codes = quantizer.codes(folded(layer, layer.weight))[0].detach()
            if usable.any():
                scale = quantizer.scale * factor.view(-1, quantizer.scale.numel()).mean(0)
                quantizer.set_qparams(scale, quantizer.zero_point.clone())
                factor = scale_of_channels(factor, scale.numel())
                write_codes(layer, codes)
            if layer.bias is not None:
                shift = found.target / count - factor * (found.output / count - layer.bias)
                layer.bias.copy_(shift.to(layer.bias.dtype))


def scale_of_channels(factor: torch.Tensor, scales: int) -> torch.Tensor:
    """Factor of each scale from ``(channels,)``: the mean where channels share a scale."""
    return factor.view(-1, scales).mean(0).repeat(len(factor) // scales)
