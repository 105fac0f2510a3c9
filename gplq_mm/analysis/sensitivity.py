# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Sensitivity: increase of the output error or loss when one operand alone is quantized."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..stream.exact_sum import ExactSum
from .operands import ModelOperand, Precision, quantized_as
from .output_metrics import Metric, Outputs

SKETCH = 512
"""Size of the random projection of the output error."""


@dataclass(frozen=True)
class Measured:
    """Measured effect of quantizing some operands.

    Attributes:
        increase: Error increase, see ``Metric``.
        sketch: Random projection of the outputs' error, ``(SKETCH,)``. Its squared norm
            approximates the error increase, inner products of two sketches the interaction
            of the errors. Empty for metrics without errors.
    """

    increase: float
    sketch: Tensor


class SensitivityMeter:
    """Compares a model with some operands quantized with its baseline.

    Memory is bounded: one batch at a time, one layer's candidate weights at a time;
    reference outputs are stored up to a limit and recomputed beyond it.

    Args:
        model: Converted model in its baseline state (see ``baseline``).
        metric: Metric of the comparison.
        forward: Outputs of the model for one batch.
        batches: This rank's batches with their global numbers, equal and in the same order
            in every call.
        keep_bytes: Bytes of reference outputs to keep.
    """

    def __init__(
        self,
        model: nn.Module,
        metric: Metric,
        forward: Callable[[Any], Outputs],
        batches: Callable[[], Iterable[tuple[int, Any]]],
        keep_bytes: int = 2**28,
    ) -> None:
        self.model = model
        self.metric = metric
        self.forward = forward
        self.batches = batches
        self.free_bytes = keep_bytes
        self._references: dict[int, Outputs] = {}

    @torch.no_grad()
    def measure(
        self, operand: ModelOperand, precisions: Mapping[int, Precision]
    ) -> dict[int, Measured]:
        """Error increase of one operand for each candidate.

        Args:
            operand: Operand to quantize in addition to the baseline.
            precisions: Its precisions by bits.

        Returns:
            Results by bits, equal on all ranks.

        Raises:
            ValueError: If an output is NaN or infinite.
        """
        trials = {str(bits): {operand.path: p} for bits, p in precisions.items()}
        found = self._compare(trials, operand.key)
        return {bits: found[str(bits)] for bits in precisions}

    @torch.no_grad()
    def measure_together(self, chosen: Mapping[str, Precision]) -> Measured:
        """Error increase of several operands together.

        Args:
            chosen: Precision by the path of the quantizer.

        Returns:
            Result, equal on all ranks.

        Raises:
            ValueError: If an output is NaN or infinite.
        """
        return self._compare({'all': chosen}, f'{len(chosen)} operands')['all']

    def _compare(
        self, trials: Mapping[str, Mapping[str, Precision]], what: str
    ) -> dict[str, Measured]:
        sums: dict[str, tuple[ExactSum, ExactSum]] = {}
        for number, batch in self.batches():
            reference = self._reference(number, batch)
            for label, chosen in trials.items():
                with quantized_as(self.model, chosen):
                    outputs = self.forward((number, batch))
                terms = self.metric.terms(reference, outputs)
                parts = (terms, sketch(self.metric.errors(reference, outputs), number))
                if not bool(terms.isfinite().all()):
                    raise ValueError(
                        f'{what}: the outputs are NaN or infinite at {label} bits; check the '
                        'checkpoint and the calibration images'
                    )
                if label not in sums:
                    first, second = (ExactSum(tuple(p.shape), p.device) for p in parts)
                    sums[label] = (first, second)
                for total, part in zip(sums[label], parts, strict=True):
                    total.add(part)
        return {label: self._finish(*totals) for label, totals in sums.items()}

    def _finish(self, terms: ExactSum, sketches: ExactSum) -> Measured:
        terms.reduce()
        if sketches.parts.numel():
            sketches.reduce()
        sums = terms.value()
        weights = self.metric.error_weights(sums)
        if not len(weights):
            return Measured(self.metric.increase(sums), weights)
        return Measured(self.metric.increase(sums), (sketches.value() * weights[:, None]).sum(0))

    def _reference(self, number: int, batch: Any) -> Outputs:
        if number in self._references:
            return self._references[number]
        outputs = [output.detach() for output in self.forward((number, batch))]
        size = sum(output.numel() * output.element_size() for output in outputs)
        if size <= self.free_bytes:
            self.free_bytes -= size
            self._references[number] = outputs
        return outputs


def sketch(errors: Outputs, number: int) -> Tensor:
    """Random projection of each tensor, equal for all candidates.

    Elements get a random sign and are summed into ``SKETCH`` bins. The expected inner product
    of two sketches is that of the tensors, with a deviation of about ``1 / sqrt(SKETCH)`` of
    the product of their norms (a count sketch: Charikar et al., ICALP 2002).

    Args:
        errors: Any shapes.
        number: Number of the batch, the seed of the signs.

    Returns:
        ``(len(errors), SKETCH)`` float64.
    """
    rows = []
    for index, error in enumerate(errors):
        generator = torch.Generator().manual_seed(1_000_003 * number + index)
        signs = torch.randint(0, 2, (error.numel(),), generator=generator, dtype=torch.int8)
        flat = error.flatten().double() * (2 * signs - 1).to(error.device)
        rows.append(F.pad(flat, (0, -len(flat) % SKETCH)).view(-1, SKETCH).sum(0))
    return torch.stack(rows) if rows else torch.zeros((0, SKETCH), dtype=torch.float64)
