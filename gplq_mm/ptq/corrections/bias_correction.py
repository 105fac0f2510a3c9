# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Bias correction: restores the mean of each output channel in the stage-1 model.

Source: arXiv 1906.04721, section 4.2, equation 16 (means measured, not derived).
"""

from typing import ClassVar

import torch

from ...stream import CallStore, Unit
from ..algorithms import register_weight_ptq
from ..task import CORRECTS, PTQTask
from ..unit_ptq import UnitPTQ
from .output_statistics import OutputMoments


@register_weight_ptq('bias_correction')
class BiasCorrection(UnitPTQ):
    """Shift the biases of quantized layers, in execution order.

    Put it after an algorithm that rounds: ``ptq=['gptq', 'bias_correction']``. A layer
    without a bias is not changed, with a note.
    """

    needs_reference = True
    phase: ClassVar[str] = CORRECTS

    @torch.no_grad()
    def quantize_unit(
        self, task: PTQTask, unit: Unit, inputs: CallStore, reference: CallStore | None
    ) -> None:
        """As in the base class."""
        for name, layer in unit.layers.items():
            if layer.bias is None:
                task.note(f'{name}: has no bias to correct')
                continue
            found = OutputMoments(task, unit, name, inputs, reference)
            shift = (found.target - found.output) / found.count.clamp_min(1)
            layer.bias.add_(shift.to(layer.bias.dtype))
