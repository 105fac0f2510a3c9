# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The gate of ``gplq_mm.calibrate``: compares the calibrated model with the float one."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..analysis.gate.bit_steps import BitSteps, discard_calibration_
from ..analysis.gate.gate_check import Gate, check_gate
from ..analysis.gate.gate_result import GateResult
from ..analysis.start_error import StartMeter, StartOutputs, as_float_model
from ..distillation.mimic_features import watched
from ..distillation.mimic_settings import PENULTIMATE
from ..stream.calls import floating_tensors
from ..stream.distributed import gather, global_number
from .distilling import OutputRecording, inputs_kept, neck_or_backbone, score_layers
from .inputs import Run
from .model_state import LOGGER, state_of


def check_calibrated(
    model: nn.Module,
    float_state: Mapping[str, Tensor],
    batches: Sequence[Run],
    images: int,
    calibrate: Callable[[], None],
) -> dict[str, Any]:
    """Compare a calibrated model with the float one, as the recipe's gate says.

    Args:
        model: Calibrated model; its recipe gets the rules of added bits.
        float_state: Float weights from before the calibration.
        batches: This rank's batches of images.
        images: Number of their images over all ranks.
        calibrate: Calibrates the model again, after bits were added.

    Returns:
        ``calibration.gate`` of a run's report; empty if the model gives no features.

    Raises:
        ValueError: If the feature error is above the limit and the gate stops; the model is
            then not calibrated and has its float weights.
    """
    settings = state_of(model).recipe.gate
    assert settings is not None
    if not images:
        _log('gate: skipped, the loop does not call the model itself', logging.INFO)
        return {}
    as_float = partial(as_float_model, model, float_state)
    outputs = _Outputs(model, as_float)

    def numbered() -> list[tuple[int, Run]]:
        return [(global_number(index), batch) for index, batch in enumerate(batches)]

    def first_batch() -> Run:
        return next(share[0] for share in gather(batches[:1]) if share)

    gate = Gate(StartMeter(model, outputs, numbered, as_float), images, settings, first_batch)

    def add_bits(found: GateResult) -> tuple[GateResult, list[dict[str, Any]]]:
        return BitSteps(gate, float_state, calibrate, lambda run: run(model), _log).run(found)

    result: dict[str, Any] = {}
    try:
        check_gate(gate, add_bits, result.update, _log)
    except ValueError:
        discard_calibration_(model, float_state)
        raise
    return result


class _Outputs:
    """Compared outputs of a batch.

    A classifier's penultimate feature (the input of the layers that compute the scores) and its
    logits; the feature maps of a detector's neck or backbone; else the model's output.
    """

    def __init__(self, model: nn.Module, as_float: Callable[[], Any]) -> None:
        self.model, self.as_float = model, as_float
        self.is_detector = state_of(model).is_detector
        self._names: list[str] | None = None

    def __call__(self, run: Run) -> StartOutputs:
        recording = OutputRecording(self.model)
        if self.is_detector:
            names = [name for name in (neck_or_backbone(self.model),) if name]
            with watched(recording, names):
                output = run(self.model)
            return StartOutputs(_maps(recording.outputs.get(names[0]) if names else output))
        if self._names is None:
            with self.as_float():
                self._names = score_layers(self.model, self.model, run)
        layers = {name: self.model.get_submodule(name) for name in self._names}
        with inputs_kept(layers, recording.score_inputs):
            output = run(self.model)
        if not recording.score_inputs:
            return StartOutputs(_maps(output))
        is_scores = isinstance(output, Tensor) and output.dim() == 2
        features = recording.levels(PENULTIMATE)
        return StartOutputs(features, logits=[output] if is_scores else [])


def _log(text: str, level: int) -> None:
    LOGGER.log(level, text)


def _maps(value: Any) -> list[Tensor]:
    found = floating_tensors(value)
    if not found:
        raise ValueError(f'{type(value).__name__} holds no floating-point tensor')
    return found
