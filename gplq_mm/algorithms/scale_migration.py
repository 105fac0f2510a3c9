# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""How far each layer's input scales follow its channels: the strength of scale migration.

A per-channel input scale is folded into the weight, ``W (s * q) = (W diag(s)) q``. Where it
follows every channel's range (strength 1) the activation loses least, but outlier channels become
outlier columns of the weight; one scale for all channels (strength 0) leaves the weight as it was.
In between, ``s_c = clip * range_c ^ strength * range_max ^ (1 - strength)``. Strength and clip are
searched for each layer on the error of its output, weights rounded too, in the order in which the
layers run, each with inputs that the layers before have quantized.

Source: the strength is SmoothQuant's alpha (arXiv 2211.10438, equation 4), here with a scale and a
zero point for each channel and both sides' errors measured.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..conversion import quantized_layers
from ..modules import QuantizedLayer, QuantLinear, weight_rows
from ..quantizers import QuantSpec, dequantize, qparams_from_range, quantize
from ..quantizers.range_search import search_range
from .calibration import Progress, RunPass
from .distributed import gather, world
from .streaming import CallStore, Unit, UnitStream, find_units
from .streaming.stream import layer_inputs

STRENGTHS = (1.0, 0.85, 0.7, 0.5, 0.25, 0.0)
CLIPS = (1.1, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
WEIGHT_SHARE = 0.5
"""Share of a rounded-to-nearest weight's error that GPTQ leaves, about."""
TOKENS = 2048
"""Tokens that a linear layer's error is measured on, an equal share of each image."""
MAPS = 4
"""Images that a convolution's error is measured on."""


@dataclass(frozen=True)
class Choice:
    """What was chosen for a layer's input.

    Attributes:
        strength: 1 where every channel has its own range, 0 where all share one.
        clip: Factor of the scales.
        activation_error: Squared error of the output by quantizing the input, relative to the
            output's energy.
        weight_error: The same by rounding the folded weight to nearest.
    """

    strength: float
    clip: float
    activation_error: float
    weight_error: float


@torch.no_grad()
def migrate_scales(
    model: nn.Module, run_pass: RunPass, progress: Progress | None = None
) -> dict[str, Choice]:
    """Search strength and clip of every per-channel input scale, and set the scales.

    Args:
        model: Converted model in evaluation mode, activations calibrated, weights float.
        run_pass: Runs the model over this rank's calibration images.
        progress: Called before each unit.

    Returns:
        The choice by layer; the same on all ranks. Layers with one input scale, and those that
        no image reaches, are left out.
    """
    layers = {n: m for n, m in quantized_layers(model).items() if m.folds_input_scale}
    if not layers:
        return {}
    units = find_units(model, quantized_layers(model), run_pass)
    stream = UnitStream(model, units, run_pass)
    chosen: dict[str, Choice] = {}
    for index, unit in enumerate(units):
        if progress is not None:
            progress(unit.name, index, len(units))
        inputs = stream.inputs(index)
        images = sum(gather(len(inputs)))
        for name in unit.layers:
            if name in layers:
                chosen[name] = _migrate(layers[name], _samples(unit, name, inputs, images))
    return chosen


def _migrate(layer: QuantizedLayer, samples: list[Tensor]) -> Choice:
    """Search, and set, the scales of one layer's input."""
    quantizer = layer.input_quantizer
    spec = quantizer.spec
    low, high = _range(quantizer.scale, quantizer.zero_point, spec)
    errors = _Errors(layer, samples)
    best: tuple[float, Choice, Tensor, Tensor] | None = None
    for strength in STRENGTHS:
        base = migrated(high - low, strength) / (spec.quant_range[1] - spec.quant_range[0])
        clip, of_input, scale, zero_point = _best_clip(errors, base, low, high, spec)
        of_weight = errors.of_weight(scale)
        total = of_input + WEIGHT_SHARE * of_weight
        if best is None or total < best[0]:
            best = total, Choice(strength, clip, of_input, of_weight), scale, zero_point
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
            if clip < 1:
                break
            continue
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
    """Zero points that put the middle of each range onto the middle of the codes.

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


def _samples(unit: Unit, name: str, inputs: CallStore, images: int) -> list[Tensor]:
    """Inputs to measure on, in the order of the images: the same on every rank.

    Args:
        unit: Holds the layer.
        name: The layer.
        inputs: Of this rank.
        images: Of all ranks.
    """
    layer = unit.layers[name]
    rank, ranks = world()
    own: list[Tensor] = []
    for index in range(len(inputs)):
        if isinstance(layer, QuantLinear):
            tokens = [x.reshape(-1, x.shape[-1]) for x in layer_inputs(unit, name, inputs[index])]
            x = torch.cat(tokens)
            own.append(x[:: max(1, len(x) * images // TOKENS)].float())
        elif index * ranks + rank < MAPS:
            own += [x.float() for x in layer_inputs(unit, name, inputs[index])]
    shares = gather([x.cpu() for x in own])
    longest = max(map(len, shares))
    ordered = [s[i].to(layer.weight.device) for i in range(longest) for s in shares if i < len(s)]
    return [torch.cat(ordered)] if isinstance(layer, QuantLinear) else ordered


class _Errors:
    """Errors of a layer's output, relative to its variance over the samples.

    Args:
        layer: Weights float.
        samples: Inputs.
    """

    def __init__(self, layer: QuantizedLayer, samples: list[Tensor]) -> None:
        self.layer, self.samples = layer, samples
        self.weight = layer.weight.detach().float()
        self.shape = (-1, *[1] * (-1 - layer.channel_axis))
        self.gram: Tensor | None = None
        if isinstance(layer, QuantLinear) and layer.out_features > layer.in_features:
            self.gram = self.weight.t() @ self.weight
        self.variance = max(self._sum([x - x.mean(0) if x.dim() == 2 else x for x in samples]), 1e-12)

    def _sum(self, changes: list[Tensor]) -> float:
        """Squared norm of the outputs of changed inputs."""
        if self.gram is not None:
            return sum(float(((x @ self.gram) * x).double().sum()) for x in changes)
        outputs = (self.layer.product(x, self.weight, None) for x in changes)
        return sum(float(y.double().square().sum()) for y in outputs)

    def of_input(self, scale: Tensor, zero_point: Tensor) -> float:
        """Error by quantizing the input; both arguments are ``(C,)``."""
        s, z = scale.view(self.shape), zero_point.view(self.shape)
        bounds = self.layer.input_quantizer.spec.quant_range
        changes = [dequantize(quantize(x, s, z, *bounds), s, z).sub_(x) for x in self.samples]
        return self._sum(changes) / self.variance

    def of_weight(self, scale: Tensor) -> float:
        """Error by rounding the weight, folded with an input scale ``(C,)``, to nearest."""
        change = self._rounding(scale)
        outputs = (self.layer.product(x, change, None) for x in self.samples)
        return sum(float(y.double().square().sum()) for y in outputs) / self.variance

    def _rounding(self, scale: Tensor) -> Tensor:
        """What rounding changes of the weight."""
        layer, quantizer = self.layer, self.layer.input_quantizer
        kept = quantizer.scale.detach().clone()
        quantizer.scale.copy_(scale)
        try:
            rows = weight_rows(layer)
            spec = layer.weight_quantizer.spec
            low, high = search_range(
                rows,
                None,
                rows.amin(1),
                rows.amax(1),
                lambda a, b: qparams_from_range(a, b, spec),
                spec.quant_range,
                steps=20,
                symmetric=spec.symmetric,
            )
            s, z = (t[:, None] for t in qparams_from_range(low, high, spec))
            change = dequantize(quantize(rows, s, z, *spec.quant_range), s, z) - rows
            shape = layer.weight.movedim(layer.weight_axis, 0).shape
            return layer.unfolded_weight(change.view(shape).movedim(0, layer.weight_axis))
        finally:
            quantizer.scale.copy_(kept)


def summary(chosen: Mapping[str, Choice]) -> str:
    """One line for the log.

    Examples:
        >>> summary({'a': Choice(1.0, 1.0, 0.01, 0.02), 'b': Choice(0.5, 0.9, 0.01, 0.02)})
        'input scales of 2 layers: migration strength 0.5 to 1, median 0.75; output error 0.01 by activations, 0.02 by weights rounded to nearest (medians)'
    """
    strengths = sorted(c.strength for c in chosen.values())

    def median(values: list[float]) -> float:
        return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))

    return (
        f'input scales of {len(chosen)} layers: migration strength {strengths[0]:g} to '
        f'{strengths[-1]:g}, median {median(strengths):g}; output error '
        f'{median([c.activation_error for c in chosen.values()]):.2g} by activations, '
        f'{median([c.weight_error for c in chosen.values()]):.2g} by weights rounded to nearest '
        '(medians)'
    )
