# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Products of the input codes of a layer that is a matrix product, and its column ranges."""

import copy
import math

import torch
from torch import Tensor

from ..ops import QuantizedLayer
from ..ops.backends.exact import FLOAT32_EXACT, max_code


def rows_of_qparams(layer: QuantizedLayer, values: Tensor) -> Tensor:
    """A scale or zero point that broadcasts over the weight, as ``(groups, rows, 1)``."""
    return layer.to_matrix(values.expand(layer.weight.shape))[..., :1].contiguous()


class CodeProducts:
    """Exact sums of products of integer codes; they do not depend on the order of the images.

    Args:
        layer: Layer whose input codes are multiplied.
        splits: Start and end of column ranges; products across ranges are not summed.
        device: Device of the sums.
    """

    def __init__(
        self, layer: QuantizedLayer, splits: list[tuple[int, int]], device: torch.device
    ) -> None:
        groups = getattr(layer, 'groups', 1)
        bound = 2 * max_code(layer.input_quantizer) ** 2  # also of a difference of codes
        self.splits = splits
        self.dtype = torch.float32 if FLOAT32_EXACT // bound >= 4096 else torch.float64
        self.tokens = FLOAT32_EXACT // bound if self.dtype == torch.float32 else 1 << 14
        self.sums = [
            torch.zeros(groups, b - a, b - a, dtype=torch.float64, device=device) for a, b in splits
        ]

    def add(self, left: Tensor, right: Tensor, levels: Tensor | None = None) -> None:
        """Add ``left^T diag(2^levels) right``.

        Args:
            left: ``(groups, tokens, columns)`` of codes.
            right: Same shape.
            levels: Integers up to 0, ``(tokens,)``; None for zeros.
        """
        if levels is None:
            self._add(left, right, 1.0)
            return
        for level in levels.unique().tolist():
            rows = (levels == level).nonzero().flatten().to(left.device)
            lhs = left.index_select(1, rows)
            self._add(lhs, lhs if right is left else right.index_select(1, rows), 2.0**level)

    def _add(self, left: Tensor, right: Tensor, factor: float) -> None:
        for start in range(0, left.shape[1], self.tokens):
            lhs = left[:, start : start + self.tokens].to(self.dtype)
            rhs = lhs if right is left else right[:, start : start + self.tokens].to(self.dtype)
            for total, (a, b) in zip(self.sums, self.splits, strict=True):
                product = lhs[..., a:b].transpose(1, 2) @ rhs[..., a:b]
                total += product if factor == 1 else product.double() * factor

    def plus(self, others: list['CodeProducts']) -> 'CodeProducts':
        """Total of these sums and others of the same layer; self if there are no others."""
        if not others:
            return self
        parts = zip(*(p.sums for p in (self, *others)), strict=True)
        return self.with_sums([torch.stack(sums).sum(0) for sums in parts])

    def with_sums(self, sums: list[Tensor]) -> 'CodeProducts':
        """Copy with other sums of the same shape, for the same layer and column ranges."""
        other = copy.copy(self)
        other.sums = sums
        return other


def column_splits(count: int, largest: int) -> list[tuple[int, int]]:
    """Equal ranges of at most ``largest`` columns.

    Examples:
        >>> column_splits(10, 4)
        [(0, 4), (4, 8), (8, 10)]
    """
    size = math.ceil(count / math.ceil(count / largest))
    return [(a, min(a + size, count)) for a in range(0, count, size)]
