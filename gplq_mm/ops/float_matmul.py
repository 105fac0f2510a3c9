# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""FloatMatMul: a matrix product that a rule keeps float."""

from torch import Tensor, nn


class FloatMatMul(nn.Module):
    """``lhs @ rhs`` in float, called like a ``QuantMatMul``; holds no state."""

    is_float = True

    def contract(self, lhs: Tensor, rhs: Tensor) -> Tensor:
        """``(..., N, K)`` times ``(..., K, M)``."""
        return lhs @ rhs

    def forward(self, lhs: Tensor, rhs: Tensor, lhs_scale: Tensor | None = None) -> Tensor:
        """``(..., N, K) @ (..., K, M)`` -> ``(..., N, M)``; with a scale ``lhs`` holds codes."""
        return self.contract(lhs if lhs_scale is None else lhs * lhs_scale, rhs)
