# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import pytest
from torch import nn

from gplq_mm.stream.evaluating import evaluating


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def mixed() -> nn.Module:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Linear(1, 1))).train()
    model[1][0].eval()
    return model


def test_all_modules_evaluate_and_get_their_own_modes_back():
    model = mixed()
    before = modes(model)
    with evaluating(model):
        assert not any(modes(model))
    assert modes(model) == before
    assert len(set(before)) == 2


def test_an_error_inside_restores_the_modes_too():
    model = mixed()
    before = modes(model)
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert modes(model) == before
