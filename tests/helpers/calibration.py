# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Outputs of any model as tensors, and ranges by the shortest way."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gplq_mm.convert import quantized_layers, quantizers
from gplq_mm.ops import weight_rows
from gplq_mm.quantizers import build_observer, qparams_from_range


def tensors(output: Any) -> list[Tensor]:
    """All floating tensors of a nested output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [t for item in output for t in tensors(item)]
    return []


@torch.no_grad()
def calibrate_activations(model: nn.Module, run: Callable[[], Any]) -> None:
    """Ranges of the activations, by the observers that the specs name."""
    found = quantizers(model, 'activation')
    for quantizer in found.values():
        quantizer.observer = build_observer(quantizer.spec)
    for index in range(2):
        for quantizer in found.values():
            quantizer.observer.pass_index = index
        run()
    for quantizer in found.values():
        qparams = quantizer.observer.calculate_qparams()
        quantizer.observer = None
        quantizer.set_qparams(*qparams)


@torch.no_grad()
def calibrate_weights(model: nn.Module) -> None:
    """Ranges of the weights, without clipping."""
    for layer in quantized_layers(model).values():
        rows = weight_rows(layer)
        spec = layer.weight_quantizer.spec
        layer.weight_quantizer.set_qparams(*qparams_from_range(rows.amin(1), rows.amax(1), spec))
