# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Keys of the state dict by the names of the tensors, with and without a hook that renames."""

from typing import Any

import torch
from torch import nn

from gplq_mm.analysis.start_error import quantization_keys
from gplq_mm.convert import convert_, state_keys


class Wrapped(nn.Module):
    """A model under the name `model`, which its state dict leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.register_buffer('unsaved', torch.zeros(1), persistent=False)
        self._register_state_dict_hook(without_prefix)


def without_prefix(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> dict[str, Any]:
    return {k.replace(f'{prefix}model.', prefix): v for k, v in state.items()}


def test_names_are_keys_where_nothing_renames() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    assert state_keys(model) == {key: key for key in model.state_dict()}


def test_both_names_of_a_shared_tensor_are_keys() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    assert state_keys(model) == {'0.weight': '0.weight', '1.weight': '1.weight'}


def test_a_renamed_key_is_found_by_its_tensor() -> None:
    model = Wrapped()
    keys = state_keys(model)
    assert keys == {f'model.{key}': key for key in model.state_dict()}
    assert 'unsaved' not in keys
    convert_(model, dict(scope='all'))
    added = quantization_keys(model)
    assert '0.input_quantizer.scale' in added and added < set(model.state_dict())
    assert not any(key.startswith('model.') for key in added)
