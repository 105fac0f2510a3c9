# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Attention with decomposed relative positions (SAM, ViTDet), all four products quantized.

The query takes part in three products: with the keys and with two tables of
relative positions (arXiv 2112.01526, section 4.1). It is quantized once.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...quantizers import FakeQuantizer
from ..backends.exact import accumulator_dtype, exact_total
from ..dispatch import compute
from ..float_matmul import FloatMatMul
from ..matmul import QuantMatMul
from ..operation import Operand, Operation
from .products import Attention, Term

if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object

Size = tuple[int, int]


def resized_table(table: Tensor, size: int) -> Tensor:
    """Relative position table for ``size`` positions, ``(2 * size - 1, D)``.

    Args:
        table: ``(L, D)``; interpolated linearly where L differs.
        size: Number of positions along the axis.

    Examples:
        >>> resized_table(torch.zeros(5, 2), 3).shape, resized_table(torch.zeros(5, 2), 4).shape
        (torch.Size([5, 2]), torch.Size([7, 2]))
    """
    length = 2 * size - 1
    if len(table) == length:
        return table
    rows = table.reshape(1, len(table), -1).permute(0, 2, 1)
    resized = F.interpolate(rows, size=length, mode='linear')
    return resized.reshape(-1, length).permute(1, 0)


def by_pairs(table: Tensor) -> Tensor:
    """Entry of a relative position table for each pair of positions, ``(S, S, D)``.

    Args:
        table: ``(2 * S - 1, D)``; or ``(S, S, D)``, which is returned.

    Examples:
        >>> by_pairs(torch.arange(3)[:, None])[..., 0].tolist()
        [[1, 0], [2, 1]]
    """
    if table.dim() == 3:
        return table
    size = (table.shape[0] + 1) // 2
    steps = torch.arange(size, device=table.device)
    return table[steps[:, None] - steps[None, :] + size - 1]


class SharedQueryMatMul(QuantMatMul):
    """``lhs @ rhs`` whose left operand the caller has quantized with ``lhs_quantizer``."""

    def forward(self, lhs: Tensor, rhs: Tensor, lhs_scale: Tensor | None = None) -> Tensor:
        """Product with the quantized ``rhs``.

        Args:
            lhs: ``(..., N, K)``; codes if ``lhs_scale`` is given, else values on the grid.
            rhs: Right operand ``(..., K, M)``, not quantized yet.
            lhs_scale: Broadcasts over the product.
        """
        if lhs_scale is None:
            return self.contract(lhs, self.rhs_quantizer(rhs))
        return compute(_SharedProduct(self), lhs, rhs, lhs_scale)

    def total(self, lhs: Tensor, rhs: Tensor) -> Tensor:
        """Product of the codes of both operands as exact integers, in the type of ``rhs``.

        Args:
            lhs: Codes, ``(..., N, K)``.
            rhs: Codes, ``(..., K, M)``.
        """
        dtype = accumulator_dtype(self.lhs_quantizer, self.rhs_quantizer, lhs.shape[-1])
        return exact_total(self.contract(lhs.to(dtype), rhs.to(dtype)), rhs.dtype)


class _SharedProduct(Operation):
    """A product whose left operand is given as codes.

    Args:
        product: The product.
    """

    kind = 'shared_product'

    def __init__(self, product: SharedQueryMatMul) -> None:
        self.product = product
        self.engine = product.engine

    def operands(self) -> dict[str, Operand]:
        """Those of the product."""
        return self.product.operands()

    def reference(self, codes: Tensor, rhs: Tensor, scale: Tensor) -> Tensor:
        """The product, rescaled once; arguments as for ``SharedQueryMatMul.forward``."""
        right, rhs_scale = self.product.rhs_quantizer.codes(rhs)
        return (self.product.total(codes, right) * (scale * rhs_scale)).to(rhs.dtype)


class _RelPosContract:
    """Einsum of queries ``(B, heads, H, W, D)`` and a table ``(2 * S - 1, D)``.

    Or a table with a row for each pair of positions, ``(H or W, S, D)``.
    """

    equation: str

    def contract(self, lhs: Tensor, rhs: Tensor) -> Tensor:
        """``(B, heads, H, W, S)``."""
        rhs = by_pairs(rhs)
        return torch.einsum(self.equation, lhs, rhs)


class FloatRelPosMatMul(_RelPosContract, FloatMatMul):
    """The product in float, where a rule keeps it so."""

    def __init__(self, equation: str) -> None:
        super().__init__()
        self.equation = equation


class QuantRelPosMatMul(_RelPosContract, SharedQueryMatMul):
    """Product of quantized queries and a relative position table.

    Args:
        equation: ``bnhwc,hkc->bnhwk`` for rows or ``bnhwc,wkc->bnhwk`` for columns.
        query: Quantizer of the queries; belongs to another module, not registered here.
        table: Quantizer of the resized table, per-tensor.
    """

    def __init__(self, equation: str, query: FakeQuantizer, table: FakeQuantizer) -> None:
        nn.Module.__init__(self)
        self.equation = equation
        self._query = (query,)
        self.rhs_quantizer = table

    @property
    def lhs_quantizer(self) -> FakeQuantizer:  # type: ignore[override]
        """Quantizer of the queries."""
        return self._query[0]


class RelPosAttention(_Base):
    """Mixin that replaces ``forward``; the float class has the parameters."""

    qkv: Any
    proj: Any
    qk_matmul: Any
    pv_matmul: Any
    rel_h_matmul: Any
    rel_w_matmul: Any
    num_heads: int
    scale: float
    use_rel_pos: bool
    rel_pos_h: Tensor
    rel_pos_w: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """``(B, H, W, C)`` -> same."""
        B, H, W, _ = x.shape
        qkv = self.qkv(x).reshape(B, H * W, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        qkv = qkv.reshape(3, B * self.num_heads, H * W, -1)
        q, k, v = qkv.unflatten(1, (B, self.num_heads)).unbind(0)  # each (B, heads, N, D)
        out = self.attend(q, k, v, (H, W), (H, W)).unflatten(2, (H, W))  # (B, heads, H, W, D)
        return self.proj(out.permute(0, 2, 3, 1, 4).reshape(B, H, W, -1))

    def tables(self, size: Size, key_size: Size) -> list[Tensor]:
        """Float tables of rows and of columns, each a right operand of its product."""
        positions = (self.rel_pos_h, self.rel_pos_w)
        return [resized_table(x, length) for x, length in zip(positions, size, strict=True)]

    def with_positions(self, logits: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
        """Logits with the row and the column terms.

        Args:
            logits: ``(B, heads, H, W, Hk, Wk)``.
            rel_h: ``(B, heads, H, W, Hk)``.
            rel_w: ``(B, heads, H, W, Wk)``.
        """
        return logits + rel_h[..., None] + rel_w[..., None, :]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, size: Size, key_size: Size) -> Tensor:
        """Attention of queries to keys, each with its own spatial size.

        Args:
            q: ``(B, heads, H * W, D)``, not scaled.
            k: ``(B, heads, Hk * Wk, D)``.
            v: Shape of ``k``.
            size: ``(H, W)``.
            key_size: ``(Hk, Wk)``.

        Returns:
            Shape of ``q``.
        """
        attention = _RelPosProducts(self, size, key_size)
        return compute(attention, q, k.transpose(-2, -1), v)

    def logits(self, q: Tensor, keys: Tensor, size: Size, key_size: Size) -> Tensor:
        """``(B, heads, H * W, Hk * Wk)``; arguments as for ``attend``, keys transposed."""
        query, scale = self.quantized_query(q)
        if scale is None:
            logits = self.qk_matmul(query * self.scale, keys)
        else:
            logits = self.qk_matmul(query, keys, scale * self.scale)
        if not self.use_rel_pos:
            return logits
        return self.positioned(logits, *self.positions(query, scale, size, key_size))

    def positions(
        self, query: Tensor, scale: Tensor | None, size: Size, key_size: Size
    ) -> tuple[Tensor, Tensor]:
        """Row terms ``(B, heads, H, W, Hk)`` and column terms ``(B, heads, H, W, Wk)``.

        Args:
            query: Codes of the queries, or values if there is no scale, ``(B, heads, N, D)``.
            scale: Scale of the codes.
            size: See ``attend``.
            key_size: See ``attend``.
        """
        grid = query.unflatten(2, size)  # (B, heads, H, W, D)
        if scale is not None and scale.dim():  # (1, heads, 1, 1); per row (B, heads, N, 1)
            scale = scale.unflatten(2, size if scale.shape[2] > 1 else (1, 1))
        rows, columns = self.tables(size, key_size)
        return self.rel_h_matmul(grid, rows, scale), self.rel_w_matmul(grid, columns, scale)

    def positioned(self, logits: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
        """``with_positions`` of logits ``(B, heads, H * W, Hk * Wk)``."""
        keys = (rel_h.shape[-1], rel_w.shape[-1])
        grid = logits.unflatten(3, keys).unflatten(2, rel_h.shape[2:4])
        return self.with_positions(grid, rel_h, rel_w).flatten(4).flatten(2, 3)

    def quantized_query(self, q: Tensor) -> tuple[Tensor, Tensor | None]:
        """Codes and their scale if every product computes on codes, else values and None.

        Args:
            q: Queries, ``(B, heads, N, D)``.
        """
        if not isinstance(self.qk_matmul, QuantMatMul):
            return q, None
        products = [self.qk_matmul]
        if self.use_rel_pos:
            products += [self.rel_h_matmul, self.rel_w_matmul]
        return compute(_SharedQuery([m for m in products if isinstance(m, QuantMatMul)]), q)


class _SharedQuery(Operation):
    """Quantization of queries used in several products: all compute on codes, or none does.

    Args:
        products: The product with the keys, then those with tables; all quantize their operands.
    """

    kind = 'shared_query'

    def __init__(self, products: list[QuantMatMul]) -> None:
        self.products = products
        self.engine = products[0].engine

    def operands(self) -> dict[str, Operand]:
        """The query, and the right operand of each product."""
        sides = [m.operands()['rhs'] for m in self.products]
        others = {f'rhs{i}': side for i, side in enumerate(sides)}
        return {'query': self.products[0].operands()['lhs'], **others}

    def reference(self, q: Tensor) -> tuple[Tensor, None]:
        """Values on the grid, and no scale."""
        return self.products[0].lhs_quantizer(q), None


class _RelPosProducts(Attention):
    """The products of ``RelPosAttention`` on one input, as one operation.

    The tables are operands of their own products, ``rel_h_matmul`` and ``rel_w_matmul``.

    Args:
        module: The attention.
        size: ``(H, W)`` of the queries.
        key_size: ``(Hk, Wk)``.
    """

    def __init__(self, module: RelPosAttention, size: Size, key_size: Size) -> None:
        super().__init__(module.qk_matmul, module.pv_matmul)
        self.module, self.size, self.key_size = module, size, key_size
        self.scale_factor = module.scale

    def _find_terms(self, q: Tensor) -> list[Term] | None:
        """Row and column terms of all queries; None if they are added otherwise."""
        module = self.module
        if type(module).with_positions is not RelPosAttention.with_positions:
            return None
        query, scale = module.quantized_query(q)
        if scale is None:
            return None
        if not module.use_rel_pos:
            return []
        rel_h, rel_w = module.positions(query, scale, self.size, self.key_size)
        tensors = rel_h.flatten(2, 3)[..., None], rel_w.flatten(2, 3)[..., None, :]
        return [Term(tensor, grid=self.key_size) for tensor in tensors]

    def logits(self, q: Tensor, k: Tensor, *tables: Tensor) -> Tensor:
        """Logits from unscaled queries, transposed keys and tables on their grids."""
        module = self.module
        total = (q * module.scale) @ k
        if not tables:
            return total
        grid = q.unflatten(2, self.size)
        rel_h = module.rel_h_matmul.contract(grid, tables[0])
        rel_w = module.rel_w_matmul.contract(grid, tables[1])
        return module.positioned(total, rel_h, rel_w)

    def extras_on_grid(self) -> list[Tensor]:
        """Tables of rows and columns, quantized unless a rule keeps their product float."""
        module = self.module
        if not module.use_rel_pos:
            return []
        products = (module.rel_h_matmul, module.rel_w_matmul)
        return [
            product.rhs_quantizer(table) if isinstance(product, QuantMatMul) else table
            for product, table in zip(
                products, module.tables(self.size, self.key_size), strict=True
            )
        ]

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        """As in the base class."""
        return self.module.logits(q, k, self.size, self.key_size).softmax(dim=-1)

    def macs(self, inputs: Sequence[torch.Size], output: torch.Size) -> int:
        """Quantizers of all products."""
        total = super().macs(inputs, output)
        if not self.module.use_rel_pos:
            return total
        return total + inputs[0].numel() * sum(self.key_size)
