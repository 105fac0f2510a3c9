# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Feed-forward network of two quantized layers, as one operation or layer by layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..compat.torch import has_hooks
from .dispatch import choose
from .engine import Engine, EngineUser
from .linear import QuantLinear
from .operation import Codes, Operand, Operation

ACTIVATIONS = (nn.GELU, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.LeakyReLU)
"""Activation functions without parameters, state or randomness."""


class FeedForward(EngineUser):
    """Mixin for modules of two layers with an activation function between them."""

    def recomputed(
        self, x: Tensor, first: Any, act: nn.Module, drops: Sequence[nn.Module], second: Any
    ) -> Tensor | None:
        """``second(drops(act(first(x))))`` with a backward pass that recomputes it.

        Args:
            x: ``(..., C)``.
            first: First layer.
            act: Activation function.
            drops: Modules between it and the second layer.
            second: Second layer.

        Returns:
            ``(..., C')``; None if the modules have to be called one by one: with another
            engine or setting, in evaluation and calibration, with a float layer or active
            dropout, and if a module has hooks.
        """
        network = TwoLayers(self.engine, first, act, drops, second)
        backend = choose(network, x)
        return None if backend is None else backend.compute(network, x)


class SequentialFeedForward(FeedForward):
    """Mixin for ``Sequential(Sequential(Linear, act, drop), Linear, drop)`` of mmcv's FFN."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """``(..., C)`` -> same."""
        parts = list(self)
        if len(parts) >= 2 and isinstance(parts[0], nn.Sequential) and len(parts[0]) >= 2:
            (first, act, *drops), second, *rest = parts
            out = self.recomputed(x, first, act, drops, second)
            if out is not None:
                for module in rest:
                    out = module(out)
                return out
        return super().forward(x)  # type: ignore[misc]


class MlpFeedForward(FeedForward):
    """Mixin for modules with ``fc1``, ``act``, ``fc2`` and an optional ``drop`` at the end."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """``(..., C)`` -> same."""
        out = self.recomputed(x, self.fc1, self.act, (), self.fc2)
        if out is None:
            return super().forward(x)  # type: ignore[misc]
        return self.drop(out) if hasattr(self, 'drop') else out


class TwoLayers(Operation):
    """``second(drops(act(first(x))))`` as one operation; it holds no state of its own.

    Args:
        engine: Engine to train with.
        first: First layer.
        act: Activation function.
        drops: Modules between it and the second layer.
        second: Second layer.
    """

    kind = 'ffn'

    def __init__(
        self, engine: Engine, first: Any, act: nn.Module, drops: Sequence[nn.Module], second: Any
    ) -> None:
        self.engine = engine
        self.first, self.act, self.drops, self.second = first, act, drops, second

    @property
    def refusal(self) -> str:
        """Why the modules cannot be computed as one operation; empty if they can."""
        layers = isinstance(self.first, QuantLinear) and isinstance(self.second, QuantLinear)
        if not layers or type(self.act) not in ACTIVATIONS:
            return 'the modules are not two linear layers around a known activation function'
        if not all(_is_identity(drop) for drop in self.drops):
            return 'elements are dropped between the layers'
        if has_hooks((self.first, self.act, *self.drops, self.second)):
            return 'hooks watch the modules'
        return ''

    def operands(self) -> dict[str, Operand]:
        """Operands of both layers: ``first.input``, ``first.weight`` and so on."""
        return {
            **_named('first', self.first.operands()),
            **_named('second', self.second.operands()),
        }

    def codes(self, *inputs: Tensor) -> dict[str, Codes]:
        """Codes of both layers; the input of the second is computed."""
        hidden = [self._hidden(x) for x in inputs]
        first, second = self.first.codes(*inputs), self.second.codes(*hidden)
        return {**_named('first', first), **_named('second', second)}

    def macs(self, inputs: Sequence[torch.Size], output: torch.Size) -> int:
        """As in the base class."""
        hidden = torch.Size((*output[:-1], self.second.in_features))
        return self.first.macs(inputs, hidden) + self.second.macs([hidden], output)

    def reference(self, x: Tensor) -> Tensor:
        """The modules one by one, ``(..., C)`` -> ``(..., C')``."""
        return self.second(self._hidden(x))

    def _hidden(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        for drop in self.drops:
            x = drop(x)
        return x


def _named(layer: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f'{layer}.{name}': value for name, value in values.items()}


def _is_identity(module: nn.Module) -> bool:
    if isinstance(module, nn.Dropout):
        return module.p == 0 or not module.training
    return isinstance(module, nn.Identity)
