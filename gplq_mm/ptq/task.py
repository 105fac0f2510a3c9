# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Interface of weight PTQ algorithms, and functions that write codes into a layer."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..calibration.float_weights import float_weights
from ..ops import QuantizedLayer
from ..quantizers import QuantSpec
from ..quantizers.spec import rows_by_scale
from ..stream.passes import Progress, RunPass

PREPARES, ROUNDS, CORRECTS = 'prepares', 'rounds', 'corrects'


@dataclass
class PTQTask:
    """Model, data and options that an algorithm gets.

    Attributes:
        model: Converted model in evaluation mode, activation quantizers calibrated.
        layers: The layers to quantize, by name, in model order.
        float_weights: Their stage-1 weights by the same names. Every algorithm of a
            combination starts from these; the layers hold codes and scales of the
            previous algorithm.
        run_pass: Runs the model once over this rank's calibration images; None for
            algorithms that need no data.
        progress: Called before each layer.
        float_biases: Their stage-1 biases, if a layer has one.
        float_norms: Stage-1 parameters of the model's normalizations, by parameter.
        input_factors: Factors that an algorithm applied to the columns of stage-1 weights,
            by layer; ``(in_features,)``.
        seed: Seed of all random numbers.
        folder: Folder for finished units, so that a killed run can continue; None to
            store nothing.
        data_key: Identifies the set of calibration images in ``folder``.
        budget_bytes: Bytes of activations kept in memory; the rest is on disk.
        notes: Limitations that algorithms report, one line each, for the log.
        blocks: Results of side branches by block, see ``QwT``.
        float_model: Context manager in which the model is the float model; None if its
            weights are not available.
        more_images: Returns a pass like ``run_pass`` over at most a given number of training
            images; None if there are no others.
    """

    model: nn.Module
    layers: Mapping[str, QuantizedLayer]
    float_weights: Mapping[str, nn.Parameter]
    run_pass: RunPass | None = None
    progress: Progress | None = None
    float_biases: Mapping[str, Tensor] = field(default_factory=dict)
    float_norms: Mapping[nn.Parameter, Tensor] = field(default_factory=dict)
    input_factors: dict[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    folder: str | None = None
    data_key: str = ''
    budget_bytes: int = 1 << 27
    notes: list[str] = field(default_factory=list)
    blocks: dict[str, Any] = field(default_factory=dict)
    float_model: Callable[[], AbstractContextManager[None]] | None = None
    more_images: Callable[[int], RunPass] | None = None

    def stage1(self) -> AbstractContextManager[None]:
        """Context manager: layers of stage 1, with float weights and quantized activations."""
        return float_weights(self.layers, self.float_weights, self.float_biases, self.float_norms)

    def note(self, text: str) -> None:
        """Add a line for the log."""
        if text not in self.notes:
            self.notes.append(text)

    def report(self, name: str, index: int, total: int) -> None:
        """Report the next layer or unit to the caller."""
        if self.progress is not None:
            self.progress(name, index, total)


class WeightPTQ(ABC):
    """Base class of algorithms that put weights on the grid of calibrated quantizers."""

    needs_data: ClassVar[bool] = False
    """Whether ``apply`` calls ``task.run_pass``."""
    uses_float_model: ClassVar[bool] = False
    """Whether ``apply`` uses ``task.float_model`` if there is one."""
    phase: ClassVar[str] = ROUNDS
    """``PREPARES`` float weights, ``ROUNDS`` them, or ``CORRECTS`` rounded weights."""
    name: ClassVar[str] = ''
    """Name in recipes."""

    def prepare(self, model: nn.Module) -> list[str]:
        """Attach the algorithm's modules to a model, before a checkpoint is loaded.

        Returns:
            Names of the changed modules; most algorithms change none.
        """
        return []

    @abstractmethod
    def apply(self, task: PTQTask) -> None:
        """Quantize every layer of the task with ``write_codes`` or ``write_nearest``."""


class RangePTQ(WeightPTQ):
    """Base class of algorithms that choose a range from the weights and round to nearest."""

    @abstractmethod
    def calculate_qparams(self, rows: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the folded weight.

        Args:
            rows: Weights that share a scale, ``(scales, elements)``.
            spec: Bits, signedness and symmetry.

        Returns:
            ``(scale, zero_point)``, each ``(scales,)``.
        """

    def apply(self, task: PTQTask) -> None:
        """Quantize each layer independently."""
        for index, (name, layer) in enumerate(task.layers.items()):
            task.report(name, index, len(task.layers))
            spec = layer.weight_quantizer.spec
            rows = rows_by_scale(spec.granularity, folded(layer, task.float_weights[name]))
            layer.weight_quantizer.set_qparams(*self.calculate_qparams(rows, spec))
            write_nearest(layer, task.float_weights[name])


def folded(layer: QuantizedLayer, weight: Tensor) -> Tensor:
    """Folded weight in float32, shape of ``weight``: PTQ rounds folded weights."""
    return layer.folded_weight(weight.detach()).float()


@torch.no_grad()
def write_nearest(layer: QuantizedLayer, weight: Tensor) -> None:
    """Write ``weight`` rounded to the nearest codes of the calibrated weight quantizer.

    Args:
        layer: Layer whose ``weight_quantizer`` is calibrated.
        weight: Float values, not folded, shape of ``layer.weight``.

    Raises:
        ValueError: See ``write_codes``.
    """
    write_codes(layer, layer.weight_quantizer.codes(folded(layer, weight))[0])


@torch.no_grad()
def write_codes(layer: QuantizedLayer, codes: Tensor) -> None:
    """Write centred integer codes into a layer's weight, as real values.

    Args:
        layer: Layer whose ``weight_quantizer`` is calibrated.
        codes: ``code - zero_point``, shape of ``layer.weight``.

    Raises:
        ValueError: If the codes are outside the quantizer's range, or if the
            weight's dtype is too coarse to reproduce the codes.
    """
    scale, _ = layer.weight_quantizer.qparams(codes)
    layer.weight.copy_(layer.unfolded_weight(codes * scale))
    again, _ = layer.weight_quantizer.codes(folded(layer, layer.weight))
    if not torch.equal(again, codes):
        raise ValueError(
            f'{layer.weight_quantizer.name or type(layer).__name__}: a {layer.weight.dtype} weight '
            f'does not reproduce its {layer.weight_quantizer.spec.num_bits}-bit codes; the codes '
            'are outside the range, or the weights must be kept in torch.float32'
        )
