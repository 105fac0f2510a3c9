# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""What a weight PTQ algorithm is, and how it writes its result into a layer."""

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
    """What an algorithm works on.

    Attributes:
        model: Converted model in evaluation mode, activation quantizers calibrated.
        layers: The layers to quantize, by name, in model order.
        float_weights: Their stage-1 weights by the same names. Every algorithm of a
            combination starts from these; it finds the codes and scales of the one
            before it in the layers.
        run_pass: Runs the model once over this rank's calibration images; None for
            algorithms that need no data.
        progress: Called before each layer.
        float_biases: Their stage-1 biases, where a layer has one.
        float_norms: Stage-1 parameters of the model's normalizations, by parameter.
        input_factors: What an algorithm multiplied the columns of stage-1 weights by, by
            layer; ``(in_features,)``.
        seed: Decides all that is drawn at random.
        folder: Where finished units are kept, so that a killed run goes on; None for
            nowhere.
        data_key: Tells one set of calibration images from another in ``folder``.
        budget_bytes: Activations kept in memory; the rest lies on disk.
        notes: What an algorithm could not do, one line each; for the log.
        blocks: Results of side branches by block, see ``QwT``.
        float_model: While open, the model is the float one; None where its weights are not at
            hand.
        more_images: Gives a pass like ``run_pass`` over up to so many training images; None
            where there are no others.
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
        """While open, the layers are those of stage 1: float weights, quantized activations."""
        return float_weights(self.layers, self.float_weights, self.float_biases, self.float_norms)

    def note(self, text: str) -> None:
        """Keep a line for the log."""
        if text not in self.notes:
            self.notes.append(text)

    def report(self, name: str, index: int, total: int) -> None:
        """Tell the caller what is quantized next."""
        if self.progress is not None:
            self.progress(name, index, total)


class WeightPTQ(ABC):
    """Base of all algorithms: leaves on-grid weights and calibrated weight quantizers."""

    needs_data: ClassVar[bool] = False
    """Whether ``apply`` calls ``task.run_pass``."""
    phase: ClassVar[str] = ROUNDS
    """``PREPARES`` float weights, ``ROUNDS`` them, or ``CORRECTS`` what another one rounded."""
    name: ClassVar[str] = ''
    """What recipes call it."""

    def prepare(self, model: nn.Module) -> list[str]:
        """Attach what the algorithm adds to a model, before a checkpoint is loaded.

        Returns:
            Names of the modules that got something; most algorithms add nothing.
        """
        return []

    @abstractmethod
    def apply(self, task: PTQTask) -> None:
        """Quantize every layer of the task with ``write_codes`` or ``write_nearest``."""


class RangePTQ(WeightPTQ):
    """Base of algorithms that choose a range from the weights alone and round to nearest."""

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
        """Layer by layer; layers do not influence each other."""
        for index, (name, layer) in enumerate(task.layers.items()):
            task.report(name, index, len(task.layers))
            spec = layer.weight_quantizer.spec
            rows = rows_by_scale(spec.granularity, folded(layer, task.float_weights[name]))
            layer.weight_quantizer.set_qparams(*self.calculate_qparams(rows, spec))
            write_nearest(layer, task.float_weights[name])


def folded(layer: QuantizedLayer, weight: Tensor) -> Tensor:
    """Folded weight in float32, shape of ``weight``: the domain in which PTQ works."""
    return layer.folded_weight(weight.detach()).float()


@torch.no_grad()
def write_nearest(layer: QuantizedLayer, weight: Tensor) -> None:
    """Write ``weight`` rounded to the nearest codes of the calibrated weight quantizer.

    Args:
        layer: Its ``weight_quantizer`` has its scale.
        weight: Float values, not folded, shape of ``layer.weight``.

    Raises:
        ValueError: See ``write_codes``.
    """
    write_codes(layer, layer.weight_quantizer.codes(folded(layer, weight))[0])


@torch.no_grad()
def write_codes(layer: QuantizedLayer, codes: Tensor) -> None:
    """Write centred integer codes into a layer's weight, as real values.

    Args:
        layer: Its ``weight_quantizer`` has its scale.
        codes: ``code - zero_point``, shape of ``layer.weight``.

    Raises:
        ValueError: If the codes are outside the quantizer's range, or if the
            weight's dtype is too coarse to give the same codes back.
    """
    scale, _ = layer.weight_quantizer.qparams(codes)
    layer.weight.copy_(layer.unfolded_weight(codes * scale))
    again, _ = layer.weight_quantizer.codes(folded(layer, layer.weight))
    if not torch.equal(again, codes):
        raise ValueError(
            f'{layer.weight_quantizer.name or type(layer).__name__}: a {layer.weight.dtype} weight '
            f'does not give back its {layer.weight_quantizer.spec.num_bits}-bit codes; the codes '
            'are outside the range, or the weights must be kept in torch.float32'
        )
