# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""QuantMatMul: a matrix product of two activations, as in attention."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..quantizers import FakeQuantizer, PerChannel, PerRow
from .dispatch import compute
from .operation import Operand, Operation


class QuantMatMul(Operation, nn.Module):
    """``lhs @ rhs`` with both operands fake-quantized.

    A scale must not vary along the summed dimension, or it could not be factored out of
    the integer sum: use one scale per tensor, per head (axis 1 of ``(B, heads, N, D)``), or
    per vector along the summed dimension (``PerRow``: a row of ``lhs``, a column of ``rhs``).

    Args:
        lhs: Quantizer of the left operand.
        rhs: Quantizer of the right operand.

    Raises:
        ValueError: If a quantizer's axis is the summed one.
    """

    kind = 'matmul'
    lhs_quantizer: FakeQuantizer
    rhs_quantizer: FakeQuantizer

    def __init__(self, lhs: FakeQuantizer, rhs: FakeQuantizer) -> None:
        super().__init__()
        for quantizer, side, axis in ((lhs, 'lhs', -1), (rhs, 'rhs', -2)):
            if quantizer.spec.granularity == PerChannel(axis):
                raise ValueError(
                    f'{side}: axis={axis} is summed over, its scales cannot be factored out of '
                    'the sum; write PerTensor(), PerChannel(axis=1) for one scale per head, or '
                    f'PerRow(axis={axis})'
                )
            if quantizer.follows_rows and quantizer.spec.granularity != PerRow(axis):
                raise ValueError(
                    f'{side}: {quantizer.spec.granularity} has scales along the summed axis; '
                    f'write PerRow(axis={axis})'
                )
        self.lhs_quantizer = lhs
        self.rhs_quantizer = rhs

    @property
    def quantizers(self) -> tuple[FakeQuantizer, FakeQuantizer]:
        """Quantizers of both operands."""
        return self.lhs_quantizer, self.rhs_quantizer

    @property
    def is_float(self) -> bool:
        """Whether neither operand is quantized or observed."""
        return not any(q.enabled or q.observer is not None for q in self.quantizers)

    def operands(self) -> dict[str, Operand]:
        """``lhs`` and ``rhs``."""
        sides = zip(('lhs', 'rhs'), self.quantizers, strict=True)
        return {name: Operand(name, q, suffix=f'.{name}') for name, q in sides}

    def macs(self, inputs: Sequence[torch.Size], output: torch.Size) -> int:
        """As in the base class."""
        return output.numel() * inputs[0][-1]

    def reference(self, lhs: Tensor, rhs: Tensor) -> Tensor:
        """``(..., N, K) @ (..., K, M)`` of values on their grids."""
        return self.contract(self.lhs_quantizer(lhs), self.rhs_quantizer(rhs))

    def contract(self, lhs: Tensor, rhs: Tensor) -> Tensor:
        """``(..., N, K)`` times ``(..., K, M)``."""
        return lhs @ rhs

    def forward(self, lhs: Tensor, rhs: Tensor) -> Tensor:
        """``(..., N, K) @ (..., K, M)`` -> ``(..., N, M)``."""
        return compute(self, lhs, rhs)
