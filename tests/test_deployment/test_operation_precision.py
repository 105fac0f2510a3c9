# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import pytest
import torch
from torch import nn

import gplq_mm
from gplq_mm.deployment.operation_precision import FLOAT, NOT_CALLED, operation_precisions

RECIPE = dict(base='w4a4', weight=dict(ptq='minmax'), mimic=None)


class Branches(nn.Module):
    """Two layers, one of which can be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.both = nn.Linear(4, 8), nn.Linear(8, 2), True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.second(x) if self.both else x


def finished(recipe=RECIPE) -> Branches:
    torch.manual_seed(0)
    model, images = Branches(), torch.randn(32, 5, 4)
    gplq_mm.quantize(model, recipe)
    gplq_mm.calibrate(model, images.split(8))
    gplq_mm.quantize_weights(model)
    return model


def found(model: nn.Module) -> dict:
    entries = operation_precisions(model, lambda: model(torch.randn(2, 5, 4)))
    return {entry.operation: entry for entry in entries}


def test_lists_the_backend_of_each_operation() -> None:
    entries = found(finished())
    assert [entry.precision for entry in entries.values()] == ['int4 x int4'] * 2
    assert {entry.backend for entry in entries.values()} == {'exact'}
    assert "not integer: engine.inference='simulated'" in entries['first'].reason
    assert 'packed' not in entries['first'].reason  # a backend of training steps
    assert not any(entry.is_float for entry in entries.values())


def test_follows_the_engine() -> None:
    model = gplq_mm.deploy(finished())
    with torch.no_grad():
        expected = gplq_mm.ops.explain(model.first, torch.randn(2, 5, 4), model.first.bias)
    assert found(model)['first'].backend == expected.split(': ')[1].split(';')[0]


def test_an_operand_that_is_off_makes_an_operation_float() -> None:
    model = finished()
    model.second.input_quantizer.enabled = False
    entry = found(model)['second']
    assert (entry.precision, entry.backend, entry.is_float) == (FLOAT, 'reference', True)
    assert 'is not quantized now' in entry.reason


def test_a_rule_that_keeps_an_operation_float_is_no_surprise() -> None:
    model = finished({**RECIPE, 'rules': [dict(name='second', enabled=False)]})
    entry = found(model)['second']
    assert entry.precision == FLOAT and entry.is_wanted_float and not entry.is_float


def test_an_operation_that_is_not_reached_is_said_so() -> None:
    model = finished()
    model.both = False
    assert found(model)['second'].precision == NOT_CALLED


def test_the_model_keeps_its_mode_and_hooks() -> None:
    model = finished().train()
    found(model)
    assert model.training and not model.first._forward_pre_hooks


def test_refuses_a_float_model() -> None:
    with pytest.raises(ValueError, match='is not quantized'):
        operation_precisions(nn.Linear(2, 2), lambda: None)
