# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Learned rounding: each weight starts between two neighbouring codes and converges to one.

Source: AdaRound, arXiv 2004.10568, equations 22 to 25.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...ops import QuantizedLayer
from ..task import folded, write_codes

ZETA, GAMMA = 1.1, -0.1
"""Ends of the stretched sigmoid."""


def rectified_sigmoid(v: Tensor) -> Tensor:
    """Share of the upper code, 0 to 1, any shape; both ends are reached with a nonzero slope.

    Examples:
        >>> rectified_sigmoid(torch.tensor([-9.0, 0.0, 9.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def inverse_rectified_sigmoid(share: Tensor) -> Tensor:
    """The ``v`` of a share of any shape; shares near 0 and 1, where the slope is 0, are clipped.

    Examples:
        >>> rectified_sigmoid(inverse_rectified_sigmoid(torch.tensor([0.25, 1.0])))
        tensor([0.2500, 0.9900])
    """
    share = share.clamp(0.01, 0.99)
    return -torch.log((ZETA - GAMMA) / (share - GAMMA) - 1)


class SoftRounding(nn.Module):
    """Weight of one layer with learnable rounding and, optionally, a learnable scale.

    Args:
        layer: Layer whose weight quantizer has a scale; its codes are the initial rounding.
        weight: Stage-1 weight, not folded.
        learn_scale: Whether the weight scale is learned (as a factor).
        commitment: Initial rounding, between the layer's codes (1) and the position of the
            float weight between its neighbours (0).
    """

    def __init__(
        self, layer: QuantizedLayer, weight: Tensor, learn_scale: bool, commitment: float
    ) -> None:
        super().__init__()
        self._layer = (layer,)
        quantizer = layer.weight_quantizer
        folded_weight = folded(layer, weight)
        scale, zero_point = quantizer.qparams(folded_weight)
        self.scale = scale.detach().clone()
        low, high = (bound - zero_point for bound in quantizer.spec.quant_range)
        self.low, self.high = low, high
        ratio = folded_weight / self.scale
        start = quantizer.codes(folded(layer, layer.weight))[0].detach()
        self.base = torch.where(start > ratio, start - 1, start)
        self.base = torch.minimum(torch.maximum(self.base, low), high)
        share = torch.lerp((ratio - self.base).clamp(0, 1), start - self.base, commitment)
        self.v = nn.Parameter(inverse_rectified_sigmoid(share))
        self.log_factor = nn.Parameter(torch.zeros_like(self.scale), requires_grad=learn_scale)

    @property
    def layer(self) -> QuantizedLayer:
        """The layer; not registered here."""
        return self._layer[0]

    def share(self) -> Tensor:
        """Share of the upper code, shape of the weight."""
        return rectified_sigmoid(self.v)

    def weight(self) -> Tensor:
        """Soft weight, not folded: the layer's effective weight."""
        codes = torch.minimum(self.base + self.share(), self.high)
        return self.layer.unfolded_weight(codes * (self.scale * self.log_factor.exp()))

    def regularizer(self, beta: float) -> Tensor:
        """``mean(1 - |2 h - 1|^beta)``: 0 if every share is 0 or 1."""
        return 1 - (2 * self.share() - 1).abs().pow(beta).mean()

    @torch.no_grad()
    def write(self) -> None:
        """Round the shares, and write codes and scale into the layer."""
        codes = torch.minimum(self.base + (self.share() >= 0.5).float(), self.high)
        quantizer = self.layer.weight_quantizer
        scale = (self.scale * self.log_factor.exp()).expand_as(self.scale)
        quantizer.set_qparams(scale.reshape(quantizer.scale.shape), quantizer.zero_point.clone())
        write_codes(self.layer, codes)


@contextmanager
def soft_weights(roundings: Iterable[SoftRounding]) -> Iterator[None]:
    """Context manager: the layers use their soft weights, and roundings get gradients."""
    roundings = list(roundings)
    try:
        for rounding in roundings:
            vars(rounding.layer)['effective_weight'] = rounding.weight
        yield
    finally:
        for rounding in roundings:
            vars(rounding.layer).pop('effective_weight', None)


@contextmanager
def only_trainable(module: nn.Module, parameters: Iterable[Any]) -> Iterator[None]:
    """Context manager: only the given parameters of ``module`` require gradients."""
    trainable = {id(p) for p in parameters}
    before = {p: p.requires_grad for p in module.parameters()}
    try:
        for p in before:
            p.requires_grad_(id(p) in trainable)
        yield
    finally:
        for p, value in before.items():
            p.requires_grad_(value)
            p.grad = None


@contextmanager
def without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Context manager: turns off activation checkpointing, which breaks ``autograd.grad``."""
    switched = [m for m in model.modules() if getattr(m, 'with_cp', False) is True]
    try:
        for module in switched:
            module.with_cp = False  # type: ignore[assignment]
        yield
    finally:
        for module in switched:
            module.with_cp = True  # type: ignore[assignment]


def annealed_beta(step: int, steps: int, warm_up: float, first: float, last: float) -> float:
    """Exponent of the regulariser: falls from ``first`` to ``last`` by a cosine after warm-up.

    Examples:
        >>> [round(annealed_beta(s, 10, 0.2, 20, 2)) for s in (2, 6, 10)]
        [20, 11, 2]
    """
    share = min(max((step / steps - warm_up) / (1 - warm_up), 0.0), 1.0)
    cosine = (1 + torch.cos(torch.tensor(share * torch.pi)).item()) / 2
    return last + (first - last) * cosine
