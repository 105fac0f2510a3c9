# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The stage-1 weights, kept while stage 2 overwrites them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from ..modules import QuantizedLayer


def copy_weights(layers: Mapping[str, QuantizedLayer]) -> dict[str, nn.Parameter]:
    """Copies of the layers' weights, on the same device, without gradient."""
    return {
        name: nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        for name, layer in layers.items()
    }


@contextmanager
def float_weights(
    layers: Mapping[str, QuantizedLayer], weights: Mapping[str, nn.Parameter]
) -> Iterator[None]:
    """While open, the layers are those of stage 1: float weights, quantized activations.

    Parameters are exchanged by reference, so it costs no copy and may be opened for
    every image.

    Args:
        layers: The layers whose weights stage 2 quantized.
        weights: What ``copy_weights`` returned before stage 2 wrote codes.
    """
    current = {name: layer.weight for name, layer in layers.items()}
    enabled = {name: layer.weight_quantizer.enabled for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.weight = weights[name]
            layer.weight_quantizer.enabled = False
        yield
    finally:
        for name, layer in layers.items():
            layer.weight = current[name]
            layer.weight_quantizer.enabled = enabled[name]
