# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Copies of the stage-1 weights, which stage 2 overwrites."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..distillation.optimizer_groups import biases_and_gains
from ..ops import QuantizedLayer


def copy_weights(layers: Mapping[str, QuantizedLayer]) -> dict[str, nn.Parameter]:
    """Copies of the layers' weights, on the same device, without gradient."""
    return {
        name: nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        for name, layer in layers.items()
    }


def copy_biases(layers: Mapping[str, QuantizedLayer]) -> dict[str, Tensor]:
    """Copies of the layers' biases."""
    return {n: la.bias.detach().clone() for n, la in layers.items() if la.bias is not None}


def copy_vectors(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    """Copies of biases, normalization parameters and LayerScale, by parameter."""
    return {p: p.detach().clone() for p in biases_and_gains(model).values()}


@contextmanager
def float_weights(
    layers: Mapping[str, QuantizedLayer],
    weights: Mapping[str, nn.Parameter],
    biases: Mapping[str, Tensor] | None = None,
    norms: Mapping[nn.Parameter, Tensor] | None = None,
) -> Iterator[None]:
    """Context manager: layers of stage 1, with float weights and quantized activations.

    Weights are exchanged by reference, without a copy, so it can be used for every
    image.

    Args:
        layers: The layers whose weights stage 2 quantized.
        weights: Result of ``copy_weights`` before stage 2 wrote codes.
        biases: Result of ``copy_biases`` at that time; None if biases did not change.
        norms: Result of ``copy_vectors`` at that time; None if normalizations did not change.
    """
    own = {layers[name].bias: value for name, value in (biases or {}).items() if name in layers}
    originals = {p: v for p, v in {**own, **(norms or {})}.items() if not torch.equal(p, v)}
    moved = {p: p.detach().clone() for p in originals}
    current = {name: layer.weight for name, layer in layers.items()}
    enabled = {name: layer.weight_quantizer.enabled for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.weight = weights[name]
            layer.weight_quantizer.enabled = False
        for parameter, value in originals.items():
            parameter.detach().copy_(value)
        yield
    finally:
        for name, layer in layers.items():
            layer.weight = current[name]
            layer.weight_quantizer.enabled = enabled[name]
        for parameter, value in moved.items():
            parameter.detach().copy_(value)
