# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The gate before stage 1: is the calibrated model close enough to the float one to train?"""

import logging
from collections.abc import Callable
from typing import Any

import torch

from ...recipe import GateSettings
from ...stream.evaluating import evaluating
from ..added_bits import ADD_BITS
from ..start_error import StartFigures, StartMeter
from .gate_result import GateResult, remedy

Log = Callable[[str, int], None]
"""Gets a message and its level."""
AddBits = Callable[[GateResult], tuple[GateResult, list[dict[str, Any]]]]
"""From the first result of the gate to its last one, and the steps, see ``BitSteps.run``."""


class Gate:
    """Compares the calibrated model with the float one on training images.

    Args:
        meter: Compares the models.
        images: Number of its images over all ranks.
        settings: ``recipe.gate``.
        first_batch: Gives the first batch, the same one on all ranks.
    """

    def __init__(
        self, meter: StartMeter, images: int, settings: GateSettings, first_batch: Callable[[], Any]
    ) -> None:
        self.meter, self.images, self.settings = meter, images, settings
        self.first_batch = first_batch

    @property
    def model(self) -> Any:
        """The converted model."""
        return self.meter.model

    def measure(self) -> GateResult:
        """Figures of the current model; above the limit also the errors with each role float."""
        limit = self.settings.max_feature_error
        with evaluating(self.model):
            found = GateResult(self.images, limit, self.meter.figures())
            if found.passed:
                return found
            return GateResult(self.images, limit, found.figures, self.meter.role_errors())

    def figures(self) -> StartFigures:
        """Figures of the current model."""
        with evaluating(self.model):
            return self.meter.figures()

    def unavailable(self) -> str | None:
        """Why the model has no features to compare; None if it has."""
        try:
            with torch.no_grad(), evaluating(self.model):
                self.meter.forward(self.first_batch())
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a project's model may raise anything
            return repr(error)
        return None


def check_gate(
    gate: Gate, add_bits: AddBits, record: Callable[[dict[str, Any]], None], log: Log
) -> None:
    """Compare the calibrated model with the float one: pass, stop, warn, or add bits.

    Args:
        gate: The gate; ``recipe.gate.action`` says what to do if it is not passed.
        add_bits: Adds bits and calibrates again.
        record: Gets the figures, before the gate stops.
        log: Gets one message per result.

    Raises:
        ValueError: If the feature error is above the limit and the gate stops.
    """
    problem = gate.unavailable()
    if problem is not None:
        log(f'gate: skipped, the model gives no features: {problem}', logging.INFO)
        return
    found, action = gate.measure(), gate.settings.action
    steps: list[dict[str, Any]] = []
    if not found.passed and action == ADD_BITS:
        found, steps = add_bits(found)
    record({**found.as_dict(), **({'steps': steps} if steps else {})})
    if found.passed:
        log(f'gate: {found.line}', logging.INFO)
        return
    log(f'gate: {found.table}', logging.WARNING)
    if action != 'warn':
        raise ValueError(remedy(found, action))
    log(f'gate: {remedy(found, action)}', logging.WARNING)
