# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""A packed weight is the stored one, for every layer class, granularity and width."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gplq_mm.deployment.code_bits import packed_size
from gplq_mm.deployment.packed_weights import WeightForm, pack_weight
from gplq_mm.ptq.task import write_nearest
from tests.helpers.layers import quantized

LAYERS = {
    'linear': (lambda: nn.Linear(6, 5), (2, 7, 6)),
    'conv': (lambda: nn.Conv2d(6, 5, 3), (2, 6, 5, 5)),
    'grouped conv': (lambda: nn.Conv2d(6, 9, 3, groups=3), (2, 6, 5, 5)),
    'depthwise conv': (lambda: nn.Conv2d(6, 6, 3, groups=6), (2, 6, 5, 5)),
    'transposed conv': (lambda: nn.ConvTranspose2d(6, 4, 2, 2), (2, 6, 5, 5)),
    'grouped transposed conv': (lambda: nn.ConvTranspose2d(6, 4, 2, 2, groups=2), (2, 6, 5, 5)),
}


def finished(name: str, bits: int, **options: Any) -> tuple[Any, Tensor]:
    """A layer after stage 2, and its input."""
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    magnitude = torch.logspace(-2, 1, 6)  # of the channels
    x = torch.randn(shape) * (magnitude if len(shape) == 3 else magnitude.view(-1, 1, 1))
    layer = quantized(build(), x, bits=(bits, 4), **options)
    write_nearest(layer, layer.weight.detach().clone())
    return layer, x


def restored(layer: Any, form: WeightForm, packed: Tensor) -> Tensor:
    own = layer.weight_quantizer
    return form.restore(packed, own.scale, own.zero_point, layer.input_quantizer.scale)


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
@pytest.mark.parametrize('per_channel', [(False, False), (True, True), (True, False)])
@pytest.mark.parametrize('name', LAYERS)
def test_restored_weight_and_output(name: str, per_channel: tuple[bool, bool], bits: int) -> None:
    fold, by_row = per_channel
    layer, x = finished(name, bits, per_channel_input=fold, per_channel_weight=by_row)
    result = pack_weight(layer)
    assert result is not None
    form, packed = result
    assert packed.numel() == packed_size(layer.weight.numel(), bits)
    weight = restored(layer, WeightForm(**form.as_dict()), packed)
    assert torch.equal(weight, layer.weight)
    before = layer.codes()['weight'].codes.clone(), layer(x).detach()
    with torch.no_grad():
        layer.weight.copy_(weight)
    after = layer.codes()['weight'].codes, layer(x).detach()
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_a_weight_off_its_grid_is_not_packed() -> None:
    layer, _ = finished('linear', 4)
    with torch.no_grad():
        layer.weight[0, 0] += 1e-3
    assert pack_weight(layer) is None


def test_the_sign_of_a_zero_may_differ() -> None:
    layer, _ = finished('linear', 4)
    with torch.no_grad():
        layer.weight[0, 0] = -0.0
    result = pack_weight(layer)
    assert result is not None
    assert not torch.signbit(restored(layer, *result)[0, 0])
