# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The gate before stage 1: is the calibrated model close enough to the float one to train?"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor

from ....analysis import format_start, format_table
from ....analysis.added_bits import ADD_BITS
from ....analysis.start_error import (
    WEIGHTS,
    RoleError,
    StartFigures,
    StartMeter,
    StartOutputs,
    as_float_model,
)
from ....recipe import GateSettings
from ....stream.evaluating import evaluating
from ..data.calibration_data import CalibrationSet
from ..data.model_outputs import start_outputs

COSTLIEST = 2
"""Number of roles that the message names."""


@dataclass(frozen=True)
class GateResult:
    """Result of the gate.

    Attributes:
        images: Number of training images compared.
        limit: ``recipe.gate.max_feature_error``.
        figures: Feature error, agreement and KL divergence of the calibrated model.
        roles: Feature error with each role float; empty if the gate is passed.
    """

    images: int
    limit: float
    figures: StartFigures
    roles: Sequence[RoleError] = ()

    @property
    def passed(self) -> bool:
        """Whether stage 1 may begin; a feature error of NaN is above any limit."""
        return self.figures.feature_error <= self.limit

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the report."""
        roles = {'roles': [asdict(r) for r in self.roles]} if self.roles else {}
        found = {'images': self.images, **self.figures.as_dict(), **roles}
        return {**found, 'limit': self.limit, 'passed': self.passed}

    @property
    def line(self) -> str:
        """The figures in one line."""
        return format_start(self.as_dict())


class Gate:
    """Compares the calibrated model with the float one on training images.

    Args:
        model: Converted model, calibrated, not wrapped.
        calibration: Images that it was calibrated on; the gate uses other ones.
        float_state: FP32 weights; calibration may have changed those of the model.
        settings: ``recipe.gate``.

    Raises:
        ValueError: If an image is also in the validation or test set.
    """

    def __init__(
        self,
        model: Any,
        calibration: CalibrationSet,
        float_state: Mapping[str, Tensor],
        settings: GateSettings,
    ) -> None:
        self.model = model
        self.settings = settings
        self.images = calibration.following(settings.num_images)
        self.float_state = float_state
        as_float = partial(as_float_model, model, float_state)
        self.meter = StartMeter(model, self._outputs, self.images.numbered, as_float)

    def measure(self) -> GateResult:
        """Figures of the current model; above the limit also the errors with each role float."""
        number, limit = len(self.images.indices), self.settings.max_feature_error
        with evaluating(self.model):
            found = GateResult(number, limit, self.meter.figures())
            if found.passed:
                return found
            return GateResult(number, limit, found.figures, self.meter.role_errors())

    def figures(self) -> StartFigures:
        """Figures of the current model."""
        with evaluating(self.model):
            return self.meter.figures()

    def unavailable(self) -> str | None:
        """Why the model has no features to compare; None if it has."""
        try:
            with torch.no_grad(), evaluating(self.model):
                self._outputs(self.images.load(0))  # the same batch on all ranks
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a project's model may raise anything
            return repr(error)
        return None

    def _outputs(self, batch: Any) -> StartOutputs:
        return start_outputs(self.model, batch)


def remedy(result: GateResult, action: str) -> str:
    """One line: what was measured, which roles cause the largest error, what to write.

    Args:
        result: A result above the limit.
        action: ``recipe.gate.action``.
    """
    costliest = result.roles[:COSTLIEST]
    named = ', '.join(
        f'{r.role} (feature error {r.feature_error:.2g} with its {r.operands} operands float)'
        for r in costliest
    )
    rules = ', '.join(f'dict(role={r.role!r}, num_bits=8)' for r in costliest if r.role != WEIGHTS)
    choices = [f'recipe=dict(rules=[{rules}])'] if rules else []
    choices += ["more bits such as recipe='w8a8'"]
    choices += [] if action == ADD_BITS else ["recipe='auto' to have bits added"]
    return (
        f'the calibrated model is too far from the float one to start stage 1: {result.line}; '
        f'these roles cause the largest error: {named}; write {", ".join(choices)}, or '
        "recipe=dict(gate=dict(action='warn')) to train anyway"
    )


def log_roles(result: GateResult) -> None:
    """Log the table of roles, the largest error first."""
    titles = ['role', 'operands', 'feature error with this role float']
    rows = [[r.role, str(r.operands), f'{r.feature_error:.3g}'] for r in result.roles]
    print_log(f'gate: {result.line}\n{format_table(titles, rows)}', 'current', logging.WARNING)
