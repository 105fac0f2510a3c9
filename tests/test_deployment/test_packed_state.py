# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The state dict comes back bit for bit, in few bytes."""

import copy

import pytest
import torch
from torch import Tensor, nn

import gplq_mm
from gplq_mm.analysis import model_bytes
from gplq_mm.deployment import packed_state, packed_weights
from gplq_mm.deployment.packed_state import pack_state, restore_state, unpack_state
from gplq_mm.ops import operations
from tests.helpers.plain_vit import PlainViT, pixels, plain_vit

X = pixels(8)
RECIPES = {
    'w4a4': dict(base='w4a4', weight=dict(ptq='gptq')),
    'w3a3': dict(base='w4a4', weight=dict(num_bits=3, ptq='mse')),
    'w2a4, asymmetric': dict(base='w4a4', weight=dict(num_bits=2, symmetric=False, ptq='mse')),
    'trained weights': dict(base='w4a4', weight=dict(qat=True, learn_scale=True)),
}


def finished(recipe: object) -> PlainViT:
    """A small model after stage 2."""
    model = plain_vit()
    gplq_mm.quantize(model, recipe)
    gplq_mm.calibrate(model, X.split(4))
    gplq_mm.quantize_weights(model, X.split(4))
    return model.eval()


@pytest.fixture(scope='module')
def model() -> PlainViT:
    return finished(RECIPES['w4a4'])


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize('name', RECIPES)
def test_the_state_and_the_output_are_equal(name: str) -> None:
    model = finished(RECIPES[name])
    state = model.state_dict()
    packed = pack_state(model)
    again = unpack_state(packed.to_bytes({}))
    assert packed.unpacked == []
    assert again.keys() == state.keys()
    for key, value in state.items():
        assert again[key].dtype == value.dtype, key
        assert again[key].shape == value.shape, key
        exact = not key.endswith(('weight', '.zero_point'))
        assert torch.equal(again[key], value), key
        assert torch.equal(bits(again[key]), bits(value)) or not exact, key
    loaded = copy.deepcopy(model)
    for parameter in loaded.parameters():
        nn.init.zeros_(parameter)
    loaded.load_state_dict(again)
    with torch.no_grad():
        assert torch.equal(bits(loaded(X)), bits(model(X)))
    for own, other in zip(operations(model).items(), operations(loaded).values(), strict=True):
        if hasattr(other, 'weight'):
            before, after = own[1].codes()['weight'].codes, other.codes()['weight'].codes
            assert torch.equal(bits(before), bits(after)), own[0]


def test_the_data_has_the_size_of_the_report(model: PlainViT) -> None:
    data = sum(t.numel() * t.element_size() for t in pack_state(model).tensors.values())
    assert data <= model_bytes(model)


def test_half_precision_keeps_codes_and_scales(model: PlainViT) -> None:
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.norm.bias[0] = 1e6  # float16 has no such number
    packed = pack_state(changed, fp16=True)
    again = unpack_state(packed.to_bytes({}))
    assert packed.full_precision == ['norm.bias']
    layers = {f'{name}.weight' for name in packed_weights.finished_layers(changed)}
    layers |= {f'blocks.{i}.attn.in_proj_weight' for i in range(2)}
    halved = 0
    for key, value in changed.state_dict().items():
        exact = '_quantizer.' in key or key in layers or key == 'norm.bias'
        assert torch.equal(again[key], value if exact else value.half().float()), key
        halved += not exact and not torch.equal(again[key], value)
    assert halved > 5


def test_a_weight_off_its_grid_is_stored_as_it_is(model: PlainViT) -> None:
    changed = copy.deepcopy(model)
    name, layer = list(packed_weights.finished_layers(changed).items())[1]
    with torch.no_grad():
        layer.weight[0, 0] += 1e-3
    packed = pack_state(changed)
    assert packed.unpacked == [name]
    again = unpack_state(packed.to_bytes({}))
    assert torch.equal(bits(again[f'{name}.weight']), bits(layer.weight.detach()))


def test_constants_and_shared_tensors_cost_nothing() -> None:
    model = finished(RECIPES['w4a4'])
    model.register_buffer('zeros', torch.full((1000,), -0.0))
    model.register_buffer('empty', torch.zeros(0, 3))
    model.register_buffer('numbers', torch.arange(9))
    model.register_buffer('ramp', torch.linspace(0, 1, 1000))
    model.register_buffer('again', model.ramp)
    packed = pack_state(model)
    assert not {'zeros', 'empty', 'numbers', 'again'} & packed.tensors.keys()
    again = unpack_state(packed.to_bytes({}))
    for key in ('zeros', 'empty', 'numbers', 'ramp', 'again'):
        assert torch.equal(bits(again[key]), bits(getattr(model, key))), key
        assert again[key].shape == getattr(model, key).shape


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'version': 9}, 'format 9, this gplq_mm reads format 1'),
        ({'casts': {'F32': ['nothing']}}, 'index does not fit'),
    ],
)
def test_another_index_is_refused(model: PlainViT, change: dict, message: str) -> None:
    packed = pack_state(model)
    packed.index.update(change)
    with pytest.raises(ValueError, match=message):
        unpack_state(packed.to_bytes({}))


def test_tensors_without_index_are_refused() -> None:
    with pytest.raises(ValueError, match='it has no gplq_packed.index'):
        restore_state({'a': torch.zeros(1)})
    with pytest.raises(ValueError, match='index cannot be read'):
        restore_state({packed_state.INDEX: torch.zeros(4, dtype=torch.uint8)})
