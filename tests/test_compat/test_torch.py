# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""What we use of torch's internals exists and does what `gplq_mm/compat/torch.py` says."""

from __future__ import annotations

import os
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gplq_mm.compat import torch as compat

INTERNALS = [
    (torch.Tensor, '_version'),
    (torch.Tensor, '_is_view'),
    (torch.ops.aten, '_unsafe_view'),
    (torch.ops.aten, 'convolution_backward'),
    (torch, '_softmax_backward_data'),
    (torch, '_fake_quantize_learnable_per_tensor_affine'),
    (nn.Module, '_load_from_state_dict'),
    (nn.Module, '_register_load_state_dict_pre_hook'),
    (nn.modules.conv, '_ConvNd'),
    (nn.Conv2d, '_conv_forward'),
    (nn.Conv2d(1, 1, 1), '_reversed_padding_repeated_twice'),
    (nn.ConvTranspose2d, '_output_padding'),
    (nn.Module(), '_forward_hooks'),
    (nn.Module(), '_forward_pre_hooks'),
    (nn.Module(), '_backward_hooks'),
    (nn.Module(), '_backward_pre_hooks'),
    (DataLoader([0]), '_iterator'),
]


@pytest.mark.parametrize(('owner', 'name'), INTERNALS, ids=[name for _, name in INTERNALS])
def test_torch_still_has(owner: Any, name: str) -> None:
    assert hasattr(owner, name), (
        f'torch {torch.__version__} has no {name} on {owner!r}: change gplq_mm/compat/torch.py'
    )


@pytest.mark.parametrize('public', [True, False])
def test_hook_before_a_state_is_loaded(monkeypatch: pytest.MonkeyPatch, public: bool) -> None:
    if not public:  # as before torch 2.5
        monkeypatch.delattr(nn.Module, 'register_load_state_dict_pre_hook')
    model = nn.Linear(1, 1, bias=False)
    seen = []

    def rename(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
        seen.append(module)
        state[prefix + 'weight'] = state.pop(prefix + 'packed')

    compat.before_load_state_dict(model, rename)
    model.load_state_dict({'packed': torch.full((1, 1), 3.0)})
    assert seen == [model]
    assert model.weight.item() == 3.0


def test_version_counts_changes_in_place() -> None:
    x = torch.zeros(2)
    before = compat.version_of(x)
    assert compat.version_of(x) == before
    x.add_(1)
    assert compat.version_of(x) > before


def test_own_tensor_is_no_view_and_copies_nothing() -> None:
    x = torch.arange(6.0)
    view = x.view(2, 3)
    own = compat.own_tensor(view)
    assert view._is_view()
    assert not own._is_view()
    assert own.data_ptr() == x.data_ptr()
    assert torch.equal(own, view)
    assert compat.own_tensor(x) is x


def test_softmax_backward_is_autograds() -> None:
    logits = torch.randn(2, 3, 5, requires_grad=True)
    p = logits.softmax(-1)
    grad = torch.randn_like(p)
    (expected,) = torch.autograd.grad(p, logits, grad)
    assert torch.equal(compat.softmax_backward(grad, p.detach()), expected)


@pytest.mark.parametrize('transposed', [False, True])
def test_convolution_backward_is_autograds(transposed: bool) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = kind(4, 6, 3, stride=2, padding=1, groups=2)
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    out = layer(x)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, (x, layer.weight), grad)
    args = (layer, grad, x.detach(), layer.weight.detach())
    found = compat.convolution_backward(*args, (True, True), [0, 0])
    for mine, of_torch in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, of_torch)
    of_x, of_weight = compat.convolution_backward(*args, (False, True), [0, 0])
    assert of_x is None
    assert of_weight is not None


@pytest.mark.parametrize('mode', ['zeros', 'reflect'])
def test_convolve_and_padding_of_input(mode: str) -> None:
    layer = nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode=mode)
    x, weight, bias = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3), torch.randn(4)
    assert compat.padding_of_input(layer) == [2, 2, 1, 1]
    padded = F.pad(x, [2, 2, 1, 1], 'constant' if mode == 'zeros' else mode)
    expected = F.conv2d(padded, weight, bias)
    torch.testing.assert_close(compat.convolve(layer, x, weight, bias), expected)


def test_output_padding_gives_the_requested_size() -> None:
    layer = nn.ConvTranspose2d(2, 2, 3, stride=2, padding=1)
    x = torch.randn(1, 2, 4, 4)
    assert list(compat.output_padding(layer, x, None)) == [0, 0]
    assert compat.output_padding(layer, x, [8, 7]) == [1, 0]
    assert layer(x, [8, 7]).shape[-2:] == (8, 7)


def test_a_load_hook_may_run_before_those_that_are_there() -> None:
    model, called = nn.Linear(2, 2), list[str]()
    for name, first in (('first', False), ('second', False), ('before', True)):
        hook = partial(lambda key, *_: called.append(key), name)
        compat.before_load_state_dict(model, hook, first=first)
    model.load_state_dict(model.state_dict())
    assert called == ['before', 'first', 'second']


def test_convolution_base_class() -> None:
    kinds = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Conv3d)
    assert all(issubclass(kind, compat.ConvNd) for kind in kinds)
    assert not issubclass(nn.Linear, compat.ConvNd)


def test_exponential_of_the_softmax() -> None:
    known = compat.softmax_exponential()
    if torch.backends.cpu.get_cpu_capability() not in ('AVX2', 'AVX512'):
        assert known is None
        return
    assert known is not None and known[0] in (8, 16) and known[1] > 0


def test_hooks_are_found() -> None:
    registered = {
        'forward': lambda m: m.register_forward_hook(lambda *_: None),
        'forward_pre': lambda m: m.register_forward_pre_hook(lambda *_: None),
        'backward': lambda m: m.register_full_backward_hook(lambda *_: None),
        'backward_pre': lambda m: m.register_full_backward_pre_hook(lambda *_: None),
    }
    for name, register in registered.items():
        module = nn.Identity()
        assert not compat.has_hooks([nn.ReLU(), module]), name
        assert not compat.has_forward_pre_hooks(module), name
        handle = register(module)
        assert compat.has_hooks([nn.ReLU(), module]), name
        assert compat.has_forward_pre_hooks(module) == (name == 'forward_pre'), name
        handle.remove()
        assert not compat.has_hooks([module]), name


class Recorder(compat.LoadsState):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer('value', torch.zeros(()))
        self.seen: list[tuple[str, str, float]] = []

    def before_load(self, state_dict: dict[str, Any], prefix: str) -> None:
        self.seen.append(('before', prefix, float(self.value)))
        state_dict[prefix + 'value'] = state_dict[prefix + 'value'] + 1

    def after_load(self, state_dict: dict[str, Any], prefix: str) -> None:
        self.seen.append(('after', prefix, float(self.value)))


def test_a_module_sees_its_state_before_and_after_it_is_loaded() -> None:
    model = nn.Sequential(nn.Identity(), Recorder())
    model.load_state_dict({'1.value': torch.tensor(4.0)})
    assert model[1].seen == [('before', '1.', 0.0), ('after', '1.', 5.0)]


class Draw:
    """Data set that says which process, and with which seed, gave a value."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        return torch.initial_seed()


def test_stop_workers_makes_the_next_epoch_start_new_ones() -> None:
    loader: Any = DataLoader(Draw(), num_workers=1, persistent_workers=True)
    first = [int(x) for x in loader]
    kept = loader._iterator
    assert kept is not None
    assert [int(x) for x in loader] == first
    assert loader._iterator is kept
    compat.stop_workers(loader)
    assert loader._iterator is None
    assert [int(x) for x in loader] != first
    compat.stop_workers(object())  # what is no DataLoader has no workers


def test_learnable_fake_quantize() -> None:
    x = torch.tensor([-3.0, 0.2, 0.6, 9.0], requires_grad=True)
    scale = torch.tensor([0.5], requires_grad=True)
    out: Tensor = compat.learnable_fake_quantize(x, scale, torch.zeros(1), -2, 1, 1.0)
    assert out.tolist() == [-1.0, 0.0, 0.5, 0.5]
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]
    assert scale.grad is not None


@pytest.mark.parametrize(
    ('version', 'forced'), [('2.4.1', True), ('2.5.0+cpu', True), ('2.11.0', False)]
)
def test_files_load_as_data_before_torch_2_6_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, forced: bool
) -> None:
    others = {k: v for k, v in os.environ.items() if k != 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'}
    monkeypatch.setattr(os, 'environ', others)
    monkeypatch.setattr(torch, '__version__', version)
    torch.save({'x': Path('x')}, tmp_path / 'a.pth')
    compat.load_safely_by_default()
    if forced:
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / 'a.pth', weights_only=False)
    else:
        assert torch.load(tmp_path / 'a.pth', weights_only=False) == {'x': Path('x')}
