# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import pytest
import torch

from gplq_mm.ops.attention.relative_position import (
    FloatRelPosMatMul,
    QuantRelPosMatMul,
    SharedQueryMatMul,
    resized_table,
)
from gplq_mm.quantizers import FakeQuantizer, PerChannel, QuantSpec
from tests.helpers.reference import calibrated

ROWS, COLUMNS = 'bnhwc,hkc->bnhwk', 'bnhwc,wkc->bnhwk'


def test_table_rows_are_distances() -> None:
    """Product with a one-hot table tells which row each pair of positions takes."""
    query = torch.eye(5).sum(0).expand(1, 1, 3, 3, 5)
    table = torch.zeros(5, 5)
    table[:, 0] = torch.arange(5)
    rows = FloatRelPosMatMul(ROWS)(query, table)  # (1, 1, H, W, S)
    columns = FloatRelPosMatMul(COLUMNS)(query, table)
    distance = torch.arange(3)[:, None] - torch.arange(3)[None, :] + 2
    assert torch.equal(rows[0, 0, :, 1].long(), distance)
    assert torch.equal(columns[0, 0, 1].long(), distance)


def test_a_table_of_pairs_is_taken_as_it_is() -> None:
    """Queries on a finer grid than keys: a row for each pair."""
    query, table = torch.randn(2, 3, 4, 2, 5), torch.randn(4, 2, 5)
    rows = FloatRelPosMatMul(ROWS)(query, table)
    torch.testing.assert_close(rows, (query.unsqueeze(4) * table[:, None]).sum(-1))
    columns = FloatRelPosMatMul(COLUMNS)(query.transpose(2, 3), table)
    torch.testing.assert_close(columns, rows.transpose(2, 3))


def test_resized_table_keeps_a_linear_table() -> None:
    table = torch.linspace(0, 1, 5)[:, None].expand(5, 2)
    assert resized_table(table, 3) is table
    larger = resized_table(table, 5)
    assert larger.shape == (9, 2)
    assert (larger[1:] >= larger[:-1]).all()


@pytest.mark.parametrize('heads', [None, 2])
@pytest.mark.parametrize('bits', [4, 8])
def test_codes_and_values_agree(heads: int | None, bits: int) -> None:
    query, table = torch.randn(3, 2, 9, 8), torch.randn(5, 8)
    granularity = {} if heads is None else dict(granularity=PerChannel(1))
    lhs = calibrated(FakeQuantizer(QuantSpec(num_bits=bits, **granularity), heads), query)
    rhs = calibrated(FakeQuantizer(QuantSpec(num_bits=bits, symmetric=False)), table)
    matmul = QuantRelPosMatMul(ROWS, lhs, rhs)
    with torch.no_grad():
        values = matmul(lhs(query).unflatten(2, (3, 3)), table)
        codes, scale = lhs.codes(query)
        scale = scale.unsqueeze(-1) if scale.dim() else scale
        product = matmul(codes.unflatten(2, (3, 3)), table, scale)
    torch.testing.assert_close(product, values, rtol=1e-5, atol=1e-5)


def test_shared_query_takes_a_factor_with_the_scale() -> None:
    query, key = torch.randn(2, 2, 4, 8), torch.randn(2, 2, 8, 5)
    lhs = calibrated(FakeQuantizer(QuantSpec(num_bits=4)), query)
    rhs = calibrated(FakeQuantizer(QuantSpec(num_bits=4)), key)
    matmul = SharedQueryMatMul(lhs, rhs)
    with torch.no_grad():
        codes, scale = lhs.codes(query)
        product = matmul(codes, key, scale * 0.5)
        values = matmul(lhs(query) * 0.5, key)
    torch.testing.assert_close(product, values, rtol=1e-5, atol=1e-5)
