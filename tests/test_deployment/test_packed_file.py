# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Packed files of `gplq_mm.save`, and files of the safetensors layout, with torch alone."""

import copy
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gplq_mm
from gplq_mm.api.checkpoint_file import load_file, write_checkpoint
from gplq_mm.deployment.packed_file import (
    ABOUT,
    PACKED_KEY,
    is_packed,
    packed_checkpoint,
    plain_values,
    unpack_checkpoint_,
    unpack_keys,
)
from tests.helpers.checkpoint_fixtures import unpacked
from tests.helpers.plain_vit import PlainViT, pixels, plain_vit

SUFFIXES = ('.pth', '.safetensors')


@pytest.fixture(scope='module')
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished model; its recipe is that of the stored checkpoint."""
    return gplq_mm.load(unpacked('plain_final', tmp_path_factory.mktemp('plain')), plain_vit(1))


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(pixels(4)).view(torch.int32)


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_save_packed_and_load(model: PlainViT, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f'x{suffix}'
    gplq_mm.save(model, path, packed=True)
    loaded = gplq_mm.load(path, plain_vit(seed=3))
    assert torch.equal(output(loaded), output(model))
    assert loaded.gplq.stage == 'stage2'  # type: ignore[union-attr]
    assert loaded.gplq.recipe == model.gplq.recipe  # type: ignore[union-attr]
    gplq_mm.save(loaded, tmp_path / f'y{suffix}', packed=True)
    assert path.read_bytes() == (tmp_path / f'y{suffix}').read_bytes() or suffix == '.pth'
    with pytest.raises(ValueError, match='checkpoint != yours: activation.num_bits: 4 != 3'):
        gplq_mm.load(path, plain_vit(), 'w3a3')


def test_a_converted_model_loads_a_packed_state_dict(model: PlainViT, tmp_path: Path) -> None:
    gplq_mm.save(model, tmp_path / 'x.pth', packed=True)
    state = torch.load(tmp_path / 'x.pth', weights_only=True)['state_dict']
    other = plain_vit(seed=4)
    gplq_mm.quantize(other, model.gplq.recipe)  # type: ignore[union-attr]
    average = copy.deepcopy(other)  # as a hook that averages weights makes it
    for converted in (other, average):
        converted.load_state_dict(state, strict=True)
        assert torch.equal(output(converted.eval()), output(model))
    assert list(state) == [PACKED_KEY]  # the caller's dict is not changed


def test_half_precision_is_recorded(model: PlainViT, tmp_path: Path) -> None:
    gplq_mm.save(model, tmp_path / 'x.pth', packed=True, fp16=True)
    about = torch.load(tmp_path / 'x.pth', weights_only=True)['gplq'][ABOUT]
    assert (about['float_dtype'], about['equals_unpacked']) == ('float16', False)
    loaded = gplq_mm.load(tmp_path / 'x.pth', plain_vit(seed=3))
    assert not torch.equal(output(loaded), output(model))


def test_what_cannot_be_packed_is_refused(tmp_path: Path) -> None:
    stage1 = gplq_mm.load(unpacked('plain_stage1', tmp_path), plain_vit())
    with pytest.raises(ValueError, match=r"at stage 'stage1'; write gplq_mm.quantize_weights"):
        gplq_mm.save(stage1, tmp_path / 'x.pth', packed=True)
    with pytest.raises(ValueError, match='write packed=True, fp16=True'):
        gplq_mm.save(stage1, tmp_path / 'x.pth', fp16=True)
    assert not (tmp_path / 'x.pth').exists()


def test_unpacked_models_as_safetensors(model: PlainViT, tmp_path: Path) -> None:
    gplq_mm.save(model, tmp_path / 'x.safetensors')
    loaded = gplq_mm.load(tmp_path / 'x.safetensors', plain_vit(seed=3))
    assert torch.equal(output(loaded), output(model))


def test_a_file_of_the_library_is_a_state_dict(tmp_path: Path) -> None:
    library = pytest.importorskip('safetensors.torch')
    library.save_file({'weight': torch.ones(2)}, tmp_path / 'x.safetensors')
    content = load_file(tmp_path / 'x.safetensors')
    assert list(content) == ['state_dict']
    assert content['state_dict']['weight'].tolist() == [1.0, 1.0]


@pytest.mark.parametrize('content', [b'', b'1234', b'\xff' * 40])
def test_what_is_no_safetensors_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / 'x.safetensors'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r'x.safetensors cannot be read: .*; write or download'):
        load_file(path)


def test_edited_entries_are_noticed(model: PlainViT) -> None:
    checkpoint = packed_checkpoint(model, {'meta': {'cfg': 'a = 1'}, 'gplq': {'stage': 'stage2'}})
    assert is_packed(checkpoint)
    checkpoint['meta']['cfg'] = 'a = 2'
    with pytest.raises(ValueError, match=r'its recipe, config or meta .* tools/deploy.py'):
        unpack_checkpoint_(checkpoint)
    checkpoint['meta']['cfg'] = 'a = 1'
    unpack_checkpoint_(checkpoint, 'x.pth')
    assert not is_packed(checkpoint)
    before = dict(checkpoint['state_dict'])
    unpack_checkpoint_(checkpoint)
    assert checkpoint['state_dict'] == before


def test_keys_get_the_prefix_of_the_model(model: PlainViT) -> None:
    content = packed_checkpoint(model, {})['state_dict'][PACKED_KEY]
    state = {f'module.{PACKED_KEY}': content, 'other': torch.zeros(1)}
    unpack_keys(model, state, 'module.')
    assert state.keys() == {'other', *(f'module.{key}' for key in model.state_dict())}
    content[-1] ^= 1
    with pytest.raises(ValueError, match='does not have the checksum'):
        unpack_keys(model, {PACKED_KEY: content})


def test_plain_values() -> None:
    class Text(str):
        pass

    value = plain_values(
        OrderedDict(a=(Text('x'), [1, None, True]), b=torch.tensor(0.5), c={3: b'z'})
    )
    assert value == {'a': ('x', [1, None, True]), 'b': 0.5, 'c': {3: b'z'}}
    assert type(value) is dict
    assert type(value['a'][0]) is str
    with pytest.raises(ValueError, match=r'checkpoint.meta.x\[1\] is a SimpleNamespace, which'):
        plain_values({'meta': {'x': [1, SimpleNamespace()]}})


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    checkpoint = {'state_dict': {'a': torch.zeros(1)}, 'meta': {'b': object()}}
    with pytest.raises(ValueError, match='checkpoint.meta.b is a object'):
        write_checkpoint(checkpoint, tmp_path / 'x.safetensors')
    assert list(tmp_path.iterdir()) == []
