# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import dataclasses

import pytest
import torch

from gplq_mm.quantizers.fake_quantizer import broadcast_shape
from gplq_mm.quantizers.spec import (
    PerChannel,
    PerRow,
    PerTensor,
    QuantSpec,
    rows_by_scale,
)


@pytest.mark.parametrize('num_bits', [1, 9, '4'])
def test_a_spec_refuses_other_bits(num_bits):
    with pytest.raises(ValueError, match='from 2 to 8'):
        QuantSpec(num_bits=num_bits)


def test_a_spec_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantSpec().num_bits = 8  # type: ignore[misc]


def test_scale_shapes():
    assert PerTensor().scale_shape(None) == () == PerTensor().scale_shape(5)
    assert PerChannel(-1).scale_shape(5) == (5,)


@pytest.mark.parametrize('size', [None, 0, -1])
def test_per_channel_needs_a_size(size):
    with pytest.raises(ValueError, match=f'positive integer; got {size}'):
        PerChannel(-1).scale_shape(size)


@pytest.mark.parametrize(
    ('axis', 'shape'),
    [(0, (7, 2)), (-1, (2, 5, 7)), (1, (2, 7, 3, 3)), (-3, (7, 4, 4)), (-1, (7,))],
)
def test_rows_hold_the_elements_of_one_scale(axis, shape):
    x = torch.randn(shape)
    granularity = PerChannel(axis)
    rows = rows_by_scale(granularity, x)
    scale = torch.arange(7.0).view(broadcast_shape(PerChannel(axis), x.dim()))
    assert rows.shape == (7, x.numel() // 7)
    assert torch.equal(rows_by_scale(granularity, x * scale), rows * torch.arange(7.0)[:, None])


def test_per_tensor_has_one_row():
    x = torch.randn(2, 3).t()
    assert torch.equal(rows_by_scale(PerTensor(), x), x.reshape(1, 6))
    assert broadcast_shape(PerTensor(), 3) == ()


@pytest.mark.parametrize('granularity', [PerTensor(), PerChannel(-1)])
def test_rows_of_an_empty_tensor_are_empty(granularity):
    assert rows_by_scale(granularity, torch.zeros(0, 4, 3)).numel() == 0


@pytest.mark.parametrize('axis', [-1, -2])
def test_a_row_scale_is_stored_as_one_number(axis):
    assert PerRow(axis).scale_shape(None) == () == PerRow(axis).scale_shape(5)
    assert broadcast_shape(PerRow(axis), 4) == ()
    x = torch.randn(2, 3, 5)
    assert torch.equal(rows_by_scale(PerRow(axis), x), x.reshape(1, 30))


@pytest.mark.parametrize('num_bits', range(2, 9))
def test_auto_codes_are_logarithmic_up_to_four_bits(num_bits):
    spec = QuantSpec(num_bits, signed=False, codes='auto')
    assert spec.log_code == ('log2' if num_bits <= 4 else None)
    assert spec.is_log == (num_bits <= 4)


@pytest.mark.parametrize('num_bits', range(2, 9))
@pytest.mark.parametrize('signed', [True, False])
@pytest.mark.parametrize('symmetric', [True, False])
def test_uniform_codes_are_the_default_and_fit_everything(num_bits, signed, symmetric):
    spec = QuantSpec(num_bits, signed, symmetric)
    assert spec.codes == 'uniform' and spec.log_code is None and not spec.is_log


@pytest.mark.parametrize(('signed', 'symmetric'), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize('codes', ['log2', 'log_sqrt2', 'adalog', 'auto'])
def test_logarithmic_codes_of_values_below_zero_are_refused(codes, signed, symmetric):
    with pytest.raises(ValueError, match=f"codes='{codes}' represent values from 0 on: write"):
        QuantSpec(4, signed, symmetric, codes=codes)


def test_auto_codes_at_bits_that_are_uniform_may_be_signed():
    assert not QuantSpec(8, codes='auto').is_log


def test_unknown_codes_are_refused():
    with pytest.raises(ValueError, match=r"codes='log3' is unknown; write 'uniform' or one of"):
        QuantSpec(4, signed=False, codes='log3')
