# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The gate of a run: calibrated and float model on training images that calibration did not see."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from ....analysis.gate.gate_check import Gate
from ....analysis.start_error import StartMeter, as_float_model
from ....recipe import GateSettings
from ..data.calibration_data import CalibrationSet
from ..data.model_outputs import start_outputs


def gate_of_run(
    model: Any,
    calibration: CalibrationSet,
    float_state: Mapping[str, Tensor],
    settings: GateSettings,
) -> Gate:
    """The gate of a run.

    Args:
        model: Converted model, calibrated, not wrapped.
        calibration: Images that it was calibrated on; the gate uses other ones.
        float_state: FP32 weights; calibration may have changed those of the model.
        settings: ``recipe.gate``.

    Raises:
        ValueError: If an image is also in the validation or test set.
    """
    images = calibration.following(settings.num_images)
    as_float = partial(as_float_model, model, float_state)
    meter = StartMeter(model, partial(start_outputs, model), images.numbered, as_float)
    return Gate(meter, len(images.indices), settings, partial(images.load, 0))
