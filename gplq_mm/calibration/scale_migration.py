# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Scale migration: how closely a layer's input scales follow the ranges of its channels.

A per-channel input scale is folded into the weight, ``W (s * q) = (W diag(s)) q``. With each
channel's own range (strength 1) the activation error is smallest, but outlier channels become
outlier columns of the weight; one scale for all channels (strength 0) does not change the weight.
In between, ``s_c = clip * range_c ^ strength * range_max ^ (1 - strength)``. Strength and clip
minimize the error of the layer's output from its input and its weight together.

Source: the strength is SmoothQuant's alpha (arXiv 2211.10438, equation 4), here with a scale and a
zero point for each channel.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ops import QuantizedLayer
from ..quantizers import QuantSpec, dequantize, qparams_from_range, quantize
from ..quantizers.range_search import search_range

STRENGTHS = (1.0, 0.85, 0.7, 0.5, 0.25, 0.0)
CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
_WEIGHT_STEPS = 10
"""Candidates per range search of a folded weight; few suffice for an estimate of its scale."""
WEIGHT_BITS = 4
"""Bits of the weight error, independent of the recipe: a stage-1 model serves all weight bits."""
MOST_SAMPLES = 1024
"""Number of tokens on which the input error of a linear layer is measured."""


@dataclass(frozen=True)
class Choice:
    """Chosen scales of a layer's input.

    Attributes:
        strength: 1 for each channel's own range, 0 for one range for all.
        clip: Factor of the scales.
        activation_error: Squared output error from quantizing the input, relative to the
            output's energy.
        weight_error: Estimate of the same from rounding the folded weight with GPTQ.
    """

    strength: float
    clip: float
    activation_error: float
    weight_error: float


@torch.no_grad()
def migrate_scale(layer: QuantizedLayer, samples: list[Tensor]) -> Choice:
    """Search and set the scales of one layer's input.

    Args:
        layer: Layer with float weight and a per-channel, calibrated input quantizer, whose
            ranges are the start of the search.
        samples: Inputs to measure on, equal on all ranks: one ``(tokens, C)`` for a linear
            layer, feature maps ``(B, C, H, W)`` for a convolution.
    """
    quantizer = layer.input_quantizer
    spec = quantizer.spec
    low, high = _range(quantizer.scale, quantizer.zero_point, spec)
    errors = _Errors(layer, samples)
    best: tuple[float, Choice, Tensor, Tensor] | None = None
    for strength in STRENGTHS:
        base = migrated(high - low, strength) / (spec.quant_range[1] - spec.quant_range[0])
        clip, of_input, scale, zero_point = _best_clip(errors, base, low, high, spec)
        of_weight = errors.of_weight(scale)
        if best is None or of_input + of_weight < best[0]:
            choice = Choice(strength, clip, of_input, of_weight)
            best = of_input + of_weight, choice, scale, zero_point
    assert best is not None
    _, choice, scale, zero_point = best
    quantizer.set_qparams(scale, zero_point)
    return choice


def _best_clip(
    errors: '_Errors', base: Tensor, low: Tensor, high: Tensor, spec: QuantSpec
) -> tuple[float, float, Tensor, Tensor]:
    """The first minimum over ``CLIPS``: ``(clip, error, scale, zero_point)``."""
    best: tuple[float, float, Tensor, Tensor] | None = None
    for clip in CLIPS:
        scale = base * clip
        zero_point = zero_point_of(scale, low, high, spec)
        error = errors.of_input(scale, zero_point)
        if best is not None and error >= best[1]:
            break
        best = clip, error, scale, zero_point
    assert best is not None
    return best


def migrated(ranges: Tensor, strength: float) -> Tensor:
    """Ranges between each channel's own and the largest, ``(C,)``.

    Examples:
        >>> migrated(torch.tensor([1.0, 4.0]), 0.5), migrated(torch.tensor([1.0, 4.0]), 1.0)
        (tensor([2., 4.]), tensor([1., 4.]))
    """
    return ranges.pow(strength) * ranges.max().pow(1 - strength)


def zero_point_of(scale: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
    """Zero points that map the middle of each range to the middle of the codes.

    Args:
        scale: ``(C,)``.
        low: Smallest values, ``(C,)``, at most 0.
        high: Largest values, ``(C,)``, at least 0.
        spec: Codes; zero points are 0 if symmetric.
    """
    if spec.symmetric:
        return torch.zeros_like(scale)
    qmin, qmax = spec.quant_range
    return torch.round((qmin + qmax) / 2 - (low + high) / 2 / scale).clamp(qmin, qmax)


def _range(scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    qmin, qmax = spec.quant_range
    scale = scale.detach()
    return (qmin - zero_point) * scale, (qmax - zero_point) * scale


class _Errors:
    """Errors of a layer's output, relative to its variance over the samples.

    Args:
        layer: Layer with float weight.
        samples: Inputs.
    """

    def __init__(self, layer: QuantizedLayer, samples: list[Tensor]) -> None:
        self.layer = layer
        self.weight_spec = replace(layer.weight_quantizer.spec, num_bits=WEIGHT_BITS)
        self.weight = layer.weight.detach().float()
        self.shape = (-1, *[1] * (-1 - layer.channel_axis))
        self.gram: Tensor | None = None
        if layer.takes_tokens:
            every = max(1, len(samples[0]) // MOST_SAMPLES)
            self.freedom = _freedom(samples[0])
            samples = [samples[0][::every]]
            if self.weight.shape[0] > self.weight.shape[1]:
                self.gram = self.weight.t() @ self.weight
        self.samples = samples
        centred = [x - x.mean(0) if x.dim() == 2 else x for x in samples]
        self.variance = max(self._sum(centred), 1e-12)

    def _sum(self, changes: list[Tensor]) -> float:
        """Squared norm of the outputs of changed inputs."""
        if self.gram is not None:
            return sum(float(((x @ self.gram) * x).double().sum()) for x in changes)
        outputs = (self.layer.product(x, self.weight, None) for x in changes)
        return sum(float(y.double().square().sum()) for y in outputs)

    def of_input(self, scale: Tensor, zero_point: Tensor) -> float:
        """Error from quantizing the input; both arguments are ``(C,)``."""
        s, z = scale.view(self.shape), zero_point.view(self.shape)
        bounds = self.layer.input_quantizer.spec.quant_range
        changes = [dequantize(quantize(x, s, z, *bounds), s, z).sub_(x) for x in self.samples]
        return self._sum(changes) / self.variance

    def of_weight(self, scale: Tensor) -> float:
        """Error from rounding the weight, folded with an input scale ``(C,)``.

        Linear layers: the error after GPTQ, a twelfth of a squared step times the part of each
        column that later columns cannot compensate. Convolutions: rounding to nearest.
        """
        rows, step, zero_point = self._folded(scale)
        if self.layer.takes_tokens:
            left = (self.freedom / scale.double().square()).sum()
            return float(step.double().square().sum() * left / 12 / self.samples_scale)
        spec = self.weight_spec
        change = dequantize(quantize(rows, step, zero_point, *spec.quant_range), step, zero_point)
        change.sub_(rows)
        shape = self.layer.weight.movedim(self.layer.weight_axis, 0).shape
        change = change.view(shape).movedim(0, self.layer.weight_axis)
        change = change / self._on_weight(scale)
        outputs = (self.layer.product(x, change, None) for x in self.samples)
        return sum(float(y.double().square().sum()) for y in outputs) / self.variance

    @property
    def samples_scale(self) -> float:
        """Variance of the outputs per token, summed over channels."""
        return self.variance / len(self.samples[0])

    def _on_weight(self, scale: Tensor) -> Tensor:
        """Input scale shaped to broadcast over the weight."""
        quantizer = self.layer.input_quantizer
        kept = quantizer.scale.detach().clone()
        quantizer.scale.copy_(scale)
        try:
            return self.layer.input_scale_on_weight().clone()
        finally:
            quantizer.scale.copy_(kept)

    def _folded(self, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the folded weight, with scale and zero point of least error for each."""
        layer, spec = self.layer, self.weight_spec
        folded = self.weight * self._on_weight(scale)
        rows = folded.movedim(layer.weight_axis, 0).flatten(1)
        low, high = search_range(
            rows,
            None,
            rows.amin(1),
            rows.amax(1),
            lambda a, b: qparams_from_range(a, b, spec),
            spec.quant_range,
            steps=_WEIGHT_STEPS,
            symmetric=spec.symmetric,
        )
        step, zero_point = qparams_from_range(low, high, spec)
        return rows, step[:, None], zero_point[:, None]


def _freedom(x: Tensor, damping: float = 0.01) -> Tensor:
    """Energy per token of each column that later columns cannot compensate, ``(C,)``.

    GPTQ rounds column by column, and later columns compensate the error of each: a rounding
    error ``e`` of column i leaves an output error ``e^2 / U_ii^2``, with U the upper Cholesky
    factor of the inverse second moments of the inputs (arXiv 2210.17323, equation 3).
    """
    rms = x.square().mean(0).sqrt().clamp_min(1e-12)
    x = x / rms
    moments = (x.t() @ x / len(x)).double()
    moments.diagonal().add_(damping)
    lower = torch.linalg.cholesky(moments.flip(0, 1))
    return lower.diagonal().square().flip(0) * rms.double().square()
