# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The stage-1 weights, kept while stage 2 overwrites them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..modules import QuantizedLayer


def copy_weights(layers: Mapping[str, QuantizedLayer]) -> dict[str, nn.Parameter]:
    """Copies of the layers' weights, on the same device, without gradient."""
    return {
        name: nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        for name, layer in layers.items()
    }


def copy_biases(layers: Mapping[str, QuantizedLayer]) -> dict[str, Tensor]:
    """Copies of the layers' biases, of those that have one."""
    return {n: la.bias.detach().clone() for n, la in layers.items() if la.bias is not None}


def copy_norms(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    """Copies of the weights and biases of the normalizations, by parameter."""
    return {
        parameter: parameter.detach().clone()
        for module in model.modules()
        if isinstance(module, nn.LayerNorm | nn.GroupNorm)
        for parameter in module.parameters(recurse=False)
    }


@contextmanager
def float_weights(
    layers: Mapping[str, QuantizedLayer],
    weights: Mapping[str, nn.Parameter],
    biases: Mapping[str, Tensor] | None = None,
    norms: Mapping[nn.Parameter, Tensor] | None = None,
) -> Iterator[None]:
    """While open, the layers are those of stage 1: float weights, quantized activations.

    Parameters are exchanged by reference, so it costs no copy and may be opened for
    every image.

    Args:
        layers: The layers whose weights stage 2 quantized.
        weights: What ``copy_weights`` returned before stage 2 wrote codes.
        biases: What ``copy_biases`` returned then; None where biases did not change.
        norms: What ``copy_norms`` returned then; None where normalizations did not change.
    """
    changed = _changed_biases(layers, biases or {})
    moved = {p: p.detach().clone() for p, v in (norms or {}).items() if not torch.equal(p, v)}
    current = {name: layer.weight for name, layer in layers.items()}
    enabled = {name: layer.weight_quantizer.enabled for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.weight = weights[name]
            layer.weight_quantizer.enabled = False
        for name in changed:
            layers[name].bias.detach().copy_((biases or {})[name])
        for parameter in moved:
            parameter.detach().copy_((norms or {})[parameter])
        yield
    finally:
        for name, layer in layers.items():
            layer.weight = current[name]
            layer.weight_quantizer.enabled = enabled[name]
        for name, bias in changed.items():
            layers[name].bias.detach().copy_(bias)
        for parameter, value in moved.items():
            parameter.detach().copy_(value)


def _changed_biases(
    layers: Mapping[str, QuantizedLayer], biases: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Present values of the biases that are not those of stage 1."""
    return {
        name: layers[name].bias.detach().clone()
        for name, bias in biases.items()
        if name in layers and not torch.equal(layers[name].bias, bias)
    }
