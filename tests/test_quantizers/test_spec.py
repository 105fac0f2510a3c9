# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import dataclasses

import pytest
import torch

from gplq_mm.quantizers.spec import (
    PerChannel,
    PerTensor,
    QuantSpec,
    broadcast_shape,
    reduce_dims,
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
    rows = reduce_dims(PerChannel(axis), x)
    scale = torch.arange(7.0).view(broadcast_shape(PerChannel(axis), x.dim()))
    assert rows.shape == (7, x.numel() // 7)
    assert torch.equal(reduce_dims(PerChannel(axis), x * scale), rows * torch.arange(7.0)[:, None])


def test_per_tensor_has_one_row():
    x = torch.randn(2, 3).t()
    assert torch.equal(reduce_dims(PerTensor(), x), x.reshape(1, 6))
    assert broadcast_shape(PerTensor(), 3) == ()


@pytest.mark.parametrize('granularity', [PerTensor(), PerChannel(-1)])
def test_rows_of_an_empty_tensor_are_empty(granularity):
    assert reduce_dims(granularity, torch.zeros(0, 4, 3)).numel() == 0
