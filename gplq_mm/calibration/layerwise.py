# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Layer-wise calibration: input scales and float weights by the error of each layer's output.

Layers are visited in execution order, each with inputs from the already quantized layers:
``scale_migration`` chooses the input scales, ``activation_compensation`` fits the weights to the
quantized inputs. All ranks use the same tokens, so N ranks and one rank get the same result.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..convert import floating, quantized_layers, quantizers
from ..ops import QuantizedLayer
from ..stream import CallStore, Unit, UnitStream, find_units
from ..stream.distributed import gather, interleave, on_all_ranks, world
from ..stream.passes import Progress, RunPass
from ..stream.unit_stream import layer_inputs
from .activation_compensation import Compensation, compensate
from .float_weights import copy_biases, copy_weights, float_weights
from .scale_migration import Choice, migrate_scale

LAYERWISE_IMAGES = 64
"""Most calibration images for the layer-wise fit of input scales and weights."""
TOKENS = 16384
"""Number of tokens used for a linear layer, an equal share of each image."""
MAPS = 4
"""Number of images used for a convolution."""


def layerwise_images(batch_size: int) -> int:
    """Most images to use: ``LAYERWISE_IMAGES``, or one batch per rank.

    Args:
        batch_size: Images per forward pass.
    """
    return max(LAYERWISE_IMAGES, batch_size * world()[1])


@dataclass
class LayerwiseResult:
    """Results for each layer, by name.

    Attributes:
        choices: Results of scale migration.
        compensations: Results of the weight fits.
    """

    choices: dict[str, Choice] = field(default_factory=dict)
    compensations: dict[str, Compensation] = field(default_factory=dict)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Plain data for a JSON report, by layer."""
        names = [*self.choices, *(n for n in self.compensations if n not in self.choices)]
        return {
            n: {
                **(asdict(self.choices[n]) if n in self.choices else {}),
                **(asdict(self.compensations[n]) if n in self.compensations else {}),
            }
            for n in names
        }

    def summary(self) -> list[str]:
        """Lines for the log."""
        lines = []
        if self.choices:
            chosen = list(self.choices.values())
            strengths = [c.strength for c in chosen]
            lines.append(
                f'input scales of {len(chosen)} layers: migration strength {min(strengths):g} to '
                f'{max(strengths):g}, median {median(strengths):g}; output error '
                f'{median(c.activation_error for c in chosen):.2g} from inputs, '
                f'{median(c.weight_error for c in chosen):.2g} from weights (medians)'
            )
        if self.compensations:
            fits = list(self.compensations.values())
            kept = sum(f.damping is None for f in fits)
            before = median(f.error_before for f in fits)
            lines.append(
                f'weights of {len(fits) - kept} layers fitted to quantized inputs, {kept} not '
                f'changed; output error on held-out images {before:.2g} -> '
                f'{median(f.error_after for f in fits):.2g} (medians)'
            )
        return lines


@torch.no_grad()
def calibrate_layerwise(
    model: nn.Module,
    run_pass: RunPass,
    migrate: bool = True,
    compensate_weights: bool = True,
    progress: Progress | None = None,
) -> LayerwiseResult:
    """Choose input scales and fit weights, layer by layer.

    Args:
        model: Converted model in evaluation mode, activations calibrated, weights float.
        run_pass: Runs the model over this rank's calibration images.
        migrate: Whether to search the scales of inputs with per-channel scales.
        compensate_weights: Whether to fit the weights of linear layers.
        progress: Called before each unit.

    Returns:
        Results, equal on all ranks. Layers that no image reaches are left out.
    """
    layers = quantized_layers(model)
    result = LayerwiseResult()
    units = find_units(model, layers, run_pass)
    weights, biases = copy_weights(layers), copy_biases(layers)

    @contextmanager
    def as_float() -> Iterator[None]:
        with floating(quantizers(model).values()), float_weights(layers, weights, biases):
            yield

    stream = UnitStream(model, units, run_pass)
    reference = UnitStream(model, units, run_pass, as_float) if compensate_weights else None
    for index, unit in enumerate(units):
        if progress is not None:
            progress(unit.name, index, len(units))
        inputs = stream.inputs(index)
        floats = None if reference is None else reference.inputs(index)
        of_float: dict[str, list[Tensor]] = {}
        if floats is not None:
            linear = [n for n, layer in unit.layers.items() if layer.takes_tokens]
            with as_float():
                of_float = _samples(unit, linear, floats)
        for name, layer in unit.layers.items():
            samples = _samples(unit, [name], inputs)[name]
            _calibrate(name, layer, samples, migrate, of_float.get(name), result)
    return result


def _calibrate(
    name: str,
    layer: QuantizedLayer,
    samples: list[Tensor],
    migrate: bool,
    floats: list[Tensor] | None,
    result: LayerwiseResult,
) -> None:
    if migrate and layer.folds_input_scale:
        joined = [torch.cat(samples)] if layer.takes_tokens else samples
        result.choices[name] = migrate_scale(layer, joined)
    if floats is None or not layer.takes_tokens or _is_frozen(layer):
        return
    if _paired(samples, floats):
        result.compensations[name] = compensate(layer, samples, floats)


def _is_frozen(layer: QuantizedLayer) -> bool:
    """Whether recipe or project freeze a layer's weight."""
    return isinstance(layer.weight, nn.Parameter) and not layer.weight.requires_grad


def _paired(samples: list[Tensor], floats: list[Tensor]) -> bool:
    """Whether both models' inputs are of the same tokens; proposals differ between models."""
    shapes = [x.shape for x in samples] == [x.shape for x in floats]
    if not shapes or not samples:
        return on_all_ranks(False)
    pairs = zip(samples, floats, strict=True)
    error = sum(float((x - f).square().sum()) for x, f in pairs)
    return on_all_ranks(error <= sum(float(f.square().sum()) for f in floats))


def _samples(unit: Unit, names: Sequence[str], inputs: CallStore) -> dict[str, list[Tensor]]:
    """Inputs of a unit's layers in image order, equal on every rank.

    Args:
        unit: The unit.
        names: Names of the layers.
        inputs: Calls of the unit on this rank.

    Returns:
        For each call of the unit ``(tokens, C)``, or feature maps for a convolution.
    """
    calls, (rank, ranks) = sum(gather(len(inputs))), world()
    own: dict[str, list[Tensor]] = {name: [] for name in names}
    for index in range(len(inputs)):
        taken = [n for n in names if is_linear(unit, n) or index * ranks + rank < MAPS]
        if not taken:
            break
        for name, found in layer_inputs(unit, taken, inputs[index]).items():
            own[name].append(_taken(torch.cat(found), is_linear(unit, name), calls))
    if ranks == 1:
        return own
    return {name: interleave(x, unit.layers[name].weight.device) for name, x in own.items()}


def is_linear(unit: Unit, name: str) -> bool:
    """Whether a layer of a unit is linear, with tokens as input."""
    return unit.layers[name].takes_tokens


def _taken(x: Tensor, tokens: bool, calls: int) -> Tensor:
    """The sample of one call: every n-th token, or the whole feature map."""
    if not tokens:
        return x.float()
    x = x.reshape(-1, x.shape[-1])
    return x[:: max(1, len(x) * calls // TOKENS)].float()
