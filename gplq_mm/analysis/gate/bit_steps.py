# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Adds bits to the activations of some roles until the gate is passed."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...convert import quantizers
from ...recipe import Recipe
from ...stream.evaluating import evaluating
from ..added_bits import add_bits_, bit_rules_of_roles
from ..cost import MacCount, bit_operations, count_macs, model_bytes
from ..operands import Precision, find_operands, quantized_as
from ..start_error import WEIGHTS
from .gate_check import Gate, Log
from .gate_result import COSTLIEST, GateResult

STEPS = (6, 8)
"""Bits that the roles with the largest error get, in this order, until the gate is passed."""


class BitSteps:
    """Gives the roles with the largest error 6, then 8 bits, until the gate is passed.

    The recipe of the model (``model.gplq.recipe``) gets the rules that say so.

    Args:
        gate: The gate, which the model has not passed.
        float_state: FP32 weights by name, from which the model is calibrated again.
        calibrate: Calibrates the model.
        run: Runs the model with a batch of the gate, to count its operations.
        log: Gets one message per step.
        copies: Copies of the model that get the same bits (EMA).
    """

    def __init__(
        self,
        gate: Gate,
        float_state: Mapping[str, Tensor],
        calibrate: Callable[[], None],
        run: Callable[[Any], Any],
        log: Log,
        copies: Sequence[nn.Module] = (),
    ) -> None:
        self.gate, self.model = gate, gate.model
        self.float_state, self.calibrate, self.log = float_state, calibrate, log
        self.copies = copies
        batch = gate.first_batch()
        with evaluating(self.model):
            self.macs = count_macs(self.model, lambda: run(batch))

    def run(self, found: GateResult) -> tuple[GateResult, list[dict[str, Any]]]:
        """Add bits until the gate is passed or no step is left.

        Args:
            found: First result of the gate.

        Returns:
            Last result of the gate, and the steps: added bits, feature error, cost.
        """
        recipe: Recipe = self.model.gplq.recipe
        own, roles = recipe.rules, self._costliest(found)
        steps = [self._step({}, found)]
        for num_bits in STEPS:
            if found.passed or not roles:
                break
            rules = bit_rules_of_roles(self.model, roles, num_bits)
            changed = [add_bits_(m, roles, num_bits) for m in (self.model, *self.copies)]
            if not changed[0]:
                continue
            self.model.gplq.recipe = recipe.change(rules=[*own, *rules])
            discard_calibration_(self.model, self.float_state)
            self.calibrate()
            found = self.gate.measure()
            steps.append(self._step(dict.fromkeys(roles, num_bits), found))
            self._log(steps)
        return found, steps

    def _costliest(self, found: GateResult) -> list[str]:
        """Roles of activations with the largest error whose bits can be increased."""
        bits = {r.role: self._least_bits(r.role) for r in found.roles if r.role != WEIGHTS}
        return [role for role, least in bits.items() if least < STEPS[-1]][:COSTLIEST]

    def _least_bits(self, role: str) -> int:
        found = quantizers(self.model, 'activation').values()
        return min(q.spec.num_bits for q in found if q.role == role)

    def _step(self, bits: Mapping[str, int], found: GateResult) -> dict[str, Any]:
        bops, size = cost_after_stage2(self.model, self.macs)
        error = found.figures.feature_error
        return {'bits': dict(bits), 'feature_error': error, 'bops': bops, 'model_bytes': size}

    def _log(self, steps: Sequence[Mapping[str, Any]]) -> None:
        first, before, now = steps[0], steps[-2], steps[-1]
        added = ', '.join(f'{role} {bits} bits' for role, bits in now['bits'].items())
        self.log(
            f'gate: {added}: feature error {before["feature_error"]:.2g} -> '
            f'{now["feature_error"]:.2g}, {now["bops"] / 1e9:.4g} G bit operations instead of '
            f'{first["bops"] / 1e9:.4g} G, {now["model_bytes"] / 2**20:.2f} MiB instead of '
            f'{first["model_bytes"] / 2**20:.2f}',
            logging.INFO,
        )


def discard_calibration_(model: nn.Module, float_state: Mapping[str, Tensor]) -> None:
    """Undo a calibration in place: float weights, and quantizers without a scale.

    Args:
        model: Converted model.
        float_state: FP32 weights by name.
    """
    model.load_state_dict(float_state, strict=False)
    for quantizer in quantizers(model).values():
        quantizer.reset()


def cost_after_stage2(model: nn.Module, macs: MacCount) -> tuple[int, int]:
    """Bit operations and packed bytes with the current activations and quantized weights.

    Args:
        model: Converted and calibrated model.
        macs: Multiply-accumulates of one forward pass.
    """
    planned = {}
    if quantizers(model, 'weight'):
        for operand in find_operands(model, kinds=('weight',)).values():
            quantizer: Any = model.get_submodule(operand.path)
            ones = quantizer.scale.new_ones(quantizer.scale.shape)
            planned[operand.path] = Precision(quantizer.spec, ones, ones - 1)
    with quantized_as(model, planned):
        return bit_operations(model, macs), model_bytes(model)
