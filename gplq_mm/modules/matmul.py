# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""QuantMatMul: a matrix product of two activations, as in attention."""

from torch import Tensor, nn

from ..quantizers import FakeQuantizer, PerChannel, PerRow
from .engine import EngineUser, packs
from .exact import accumulator_dtype, exact_total, use_codes
from .fused_matmul import packed_matmul


class QuantMatMul(EngineUser, nn.Module):
    """``lhs @ rhs`` with both operands fake-quantized.

    A scale must not vary along the summed dimension, or it could not be taken out
    of the integer sum: use per-tensor, per-head (axis 1 of ``(B, heads, N, D)``), or one
    scale a vector along the summed dimension (``PerRow``: a row of ``lhs``, a column of ``rhs``).

    Args:
        lhs: Quantizer of the left operand.
        rhs: Quantizer of the right operand.

    Raises:
        ValueError: If a quantizer's axis is the summed one.
    """

    def __init__(self, lhs: FakeQuantizer, rhs: FakeQuantizer) -> None:
        super().__init__()
        for quantizer, side, axis in ((lhs, 'lhs', -1), (rhs, 'rhs', -2)):
            if quantizer.spec.granularity == PerChannel(axis):
                raise ValueError(
                    f'{side}: axis={axis} is summed over, its scales cannot leave the integer '
                    'sum; write PerTensor(), PerChannel(axis=1) for one scale a head, or '
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
    def is_float(self) -> bool:
        """Whether neither operand is quantized or observed."""
        return not any(
            q.enabled or q.observer is not None for q in (self.lhs_quantizer, self.rhs_quantizer)
        )

    def forward(self, lhs: Tensor, rhs: Tensor) -> Tensor:
        """``(..., N, K) @ (..., K, M)`` -> ``(..., N, M)``."""
        if packs(self.engine, self.lhs_quantizer, self.rhs_quantizer):
            return packed_matmul(self.lhs_quantizer, self.rhs_quantizer, lhs, rhs)
        if not use_codes(lhs, self.lhs_quantizer, self.rhs_quantizer):
            return self.lhs_quantizer(lhs) @ self.rhs_quantizer(rhs)
        left, left_scale = self.lhs_quantizer.codes(lhs)
        right, right_scale = self.rhs_quantizer.codes(rhs)
        dtype = accumulator_dtype(self.lhs_quantizer, self.rhs_quantizer, lhs.shape[-1])
        total = exact_total(left.to(dtype) @ right.to(dtype), left.dtype)
        return (total * (left_scale * right_scale)).to(lhs.dtype)
