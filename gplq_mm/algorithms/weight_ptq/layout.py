# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""A layer as a matrix product: rows of weights, columns of inputs."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...compat.torch import padding_of_input
from ...modules import QuantConv2d, QuantConvTranspose2d, QuantizedLayer
from ...modules.exact import FLOAT32_EXACT, max_code

_STRIP = 1 << 23
"""Elements of an unfolded input handled at once."""


def is_matrix_product(layer: QuantizedLayer) -> bool:
    """Whether ``to_rows`` and ``columns`` fit: not for a transposed convolution that overlaps."""
    if not isinstance(layer, QuantConvTranspose2d):
        return True
    return (
        tuple(layer.stride) == tuple(layer.kernel_size)
        and set(layer.padding) == {0}
        and set(layer.dilation) == {1}
    )


def to_rows(layer: QuantizedLayer, weight: Tensor) -> Tensor:
    """Weight as ``(groups, rows, columns)``; a row is summed with a column of the input.

    Args:
        layer: Linear, convolution or transposed convolution.
        weight: Shape of ``layer.weight``.
    """
    groups = getattr(layer, 'groups', 1)
    if isinstance(layer, QuantConvTranspose2d):  # (in, out / groups, kH, kW)
        return weight.reshape(groups, weight.shape[0] // groups, -1).transpose(1, 2)
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def from_rows(layer: QuantizedLayer, rows: Tensor) -> Tensor:
    """Inverse of ``to_rows``."""
    if isinstance(layer, QuantConvTranspose2d):
        rows = rows.transpose(1, 2)
    return rows.reshape(layer.weight.shape)


def rows_of_qparams(layer: QuantizedLayer, values: Tensor) -> Tensor:
    """A scale or zero point that broadcasts over the weight, as ``(groups, rows, 1)``."""
    return to_rows(layer, values.expand(layer.weight.shape))[..., :1].contiguous()


def columns(layer: Any, x: Tensor) -> Iterator[Tensor]:
    """Input as ``(groups, tokens, columns)``, in parts.

    Args:
        layer: As in ``to_rows``.
        x: Input of the layer.
    """
    if isinstance(layer, QuantConvTranspose2d):  # each pixel meets each kernel element once
        yield _by_group(x.flatten(2).transpose(1, 2).flatten(0, 1), layer.groups)
    elif isinstance(layer, QuantConv2d):
        yield from _unfolded(layer, x)
    else:
        yield x.reshape(1, -1, x.shape[-1])


def _by_group(tokens: Tensor, groups: int) -> Tensor:
    return tokens.unflatten(1, (groups, -1)).transpose(0, 1)


def _unfolded(layer: QuantConv2d, x: Tensor) -> Iterator[Tensor]:
    """Strips of output rows, so that the unfolded input stays small."""
    x = x[None] if x.dim() == 3 else x
    mode = 'constant' if layer.padding_mode == 'zeros' else layer.padding_mode
    x = F.pad(x, padding_of_input(layer), mode=mode)
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    height = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
    width = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    strip = max(1, _STRIP // max(len(x) * x.shape[1] * kh * kw * width, 1))
    for top in range(0, height, strip):
        count = min(strip, height - top)
        parts = [
            x[
                :,
                :,
                i * dh + top * sh : i * dh + (top + count - 1) * sh + 1 : sh,
                j * dw : j * dw + (width - 1) * sw + 1 : sw,
            ]
            for i in range(kh)
            for j in range(kw)
        ]
        cols = torch.stack(parts, 2).flatten(1, 2)  # (B, C * kH * kW, count, width)
        yield _by_group(cols.permute(0, 2, 3, 1).flatten(0, 2), layer.groups)


class CodeProducts:
    """Sums of products of integer codes, exact, so that the order of images is no matter.

    Args:
        layer: Whose input codes are multiplied.
        splits: Start and end of the column ranges between which no products are kept.
        device: Where to sum.
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
            levels: Whole numbers, ``(tokens,)``, not above 0; None for zeros.
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
        """These sums with those of others of the same layer; self where there are none."""
        if not others:
            return self
        parts = zip(*(p.sums for p in (self, *others)), strict=True)
        return self.with_sums([torch.stack(sums).sum(0) for sums in parts])

    def with_sums(self, sums: list[Tensor]) -> 'CodeProducts':
        """Products of the same layer and column ranges with other sums."""
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
