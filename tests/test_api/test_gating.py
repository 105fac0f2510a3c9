# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The gate of `calibrate`: what it compares, when it stops, and what `recipe='auto'` adds."""

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gplq_mm
from gplq_mm.convert import quantizers, resolve_recipe
from tests.helpers.models import Detector, image
from tests.helpers.plain_vit import pixels, plain_vit

PLAIN = dict(calibration=dict(num_images=16, migrate=False, compensate=True))
BROKEN = {**PLAIN, 'activation': dict(num_bits=2, observer='minmax')}
X = pixels(24)


def quantized(recipe: Any) -> Any:
    model = plain_vit()
    gplq_mm.quantize(model, recipe)
    return model


def feature_error(model: nn.Module, x: Tensor) -> float:
    """Relative squared error of the head's inputs, by hand."""
    kept: list[Tensor] = []
    for network in (plain_vit(), model):
        handle = network.head.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        with torch.no_grad():
            network.eval()(x)
        handle.remove()
    return float((kept[1] - kept[0]).square().sum() / kept[0].square().sum())


def test_the_images_that_follow_are_compared() -> None:
    model = quantized({**PLAIN, 'gate': dict(num_images=6)})
    gate = gplq_mm.calibrate(model, X.split(5)).gate
    assert (gate['images'], gate['limit'], gate['passed']) == (6, 0.5, True)
    assert gate['feature_error'] == pytest.approx(feature_error(model, X[16:22]), rel=1e-4)
    assert gate['kl'] > 0 and 0 < gate['agreement'] <= 1 and 'roles' not in gate


def test_without_other_images_those_of_the_calibration_are_compared() -> None:
    model = quantized({**PLAIN, 'gate': dict(num_images=6)})
    gate = gplq_mm.calibrate(model, X[:16].split(5)).gate
    assert gate['images'] == 6
    assert gate['feature_error'] == pytest.approx(feature_error(model, X[:6]), rel=1e-4)


def test_a_loop_is_compared_on_its_first_calls() -> None:
    model = quantized({**PLAIN, 'gate': dict(num_images=6)})

    def loop(network: nn.Module) -> None:
        for part in X[:16].split(4):
            network(pixels=part)

    gate = gplq_mm.calibrate(model, forward_loop=loop).gate
    assert gate['images'] == 8
    assert gate['feature_error'] == pytest.approx(feature_error(model, X[:8]), rel=1e-4)


def test_the_gate_changes_nothing_of_a_model_that_passes() -> None:
    one, two = (quantized({**PLAIN, 'gate': gate}) for gate in (dict(num_images=8), None))
    assert gplq_mm.calibrate(one, [X]).gate and not gplq_mm.calibrate(two, [X]).gate
    states = one.state_dict(), two.state_dict()
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    assert one.training


@pytest.mark.parametrize('action', ['stop', 'warn'])
def test_a_broken_start(action: str, caplog: pytest.LogCaptureFixture) -> None:
    model = quantized({**BROKEN, 'gate': dict(max_feature_error=1e-3, action=action)})
    before = {k: v.clone() for k, v in plain_vit().state_dict().items()}
    message = 'too far from the float one to start stage 1: feature error'
    if action == 'warn':
        with caplog.at_level(logging.WARNING, 'gplq_mm'):
            gate = gplq_mm.calibrate(model, [X]).gate
        errors = [role['feature_error'] for role in gate['roles']]
        assert not gate['passed'] and errors == sorted(errors)
        assert any(message in record.getMessage() for record in caplog.records)
        assert model.gplq.stage == 'calibrated'
        return
    with pytest.raises(ValueError, match=message) as caught:
        gplq_mm.calibrate(model, [X])
    assert '\n' not in str(caught.value) and "gate=dict(action='warn')" in str(caught.value)
    state = model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in before.items())
    assert not any(q.is_calibrated for q in quantizers(model).values())
    with pytest.raises(ValueError, match='is not calibrated'):
        gplq_mm.distill(model, plain_vit())


AUTO = {
    **PLAIN,
    'base': 'auto',
    'name': 'auto',
    'activation': dict(num_bits=8),
    'rules': [dict(role='input', activation=dict(num_bits=2, observer='minmax'))],
    'gate': dict(max_feature_error=3e-4),
}
"""Begins with broken inputs, so that they get bits."""


def test_auto_adds_bits_and_the_recipe_says_so(tmp_path: Any) -> None:
    model = quantized(AUTO)
    own = resolve_recipe(AUTO)['rules']
    gate = gplq_mm.calibrate(model, [X]).gate
    first, *added = gate['steps']
    assert gate['passed'] and first['bits'] == {} and first['feature_error'] > 0.01
    assert [step['bits'] for step in added] == [{'input': 6}, {'input': 8}][: len(added)]
    assert added[-1]['feature_error'] == gate['feature_error'] <= 3e-4
    assert first['bops'] < added[-1]['bops']
    bits = added[-1]['bits']['input']
    rules = model.gplq.recipe.as_dict()['rules']
    assert rules == [*own, {'role': 'input', 'activation': {'num_bits': bits}}]
    inputs = [q for q in quantizers(model, 'activation').values() if q.role == 'input']
    assert inputs and all(q.spec.num_bits == bits and q.is_calibrated for q in inputs)
    gplq_mm.save(model, tmp_path / 'm.pth')
    loaded = gplq_mm.load(tmp_path / 'm.pth', plain_vit(seed=3), recipe=AUTO)
    assert torch.equal(loaded(X), model.eval()(X))
    with pytest.raises(ValueError, match='made with another recipe'):
        gplq_mm.load(
            tmp_path / 'm.pth', plain_vit(), recipe={**AUTO, 'activation': dict(num_bits=6)}
        )

    named = quantized({**AUTO, 'rules': [*AUTO['rules'], rules[-1]]})
    assert 'steps' not in gplq_mm.calibrate(named, [X]).gate
    states = named.state_dict(), model.state_dict()
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_a_detector_is_compared_by_its_neck() -> None:
    model, x = Detector(), image(4)
    teacher = copy.deepcopy(model).eval()
    gplq_mm.quantize(model, {'calibration': dict(migrate=False, compensate=False, num_images=4)})
    gate = gplq_mm.calibrate(model, x.split(2)).gate
    maps: list[Tensor] = []
    for network in (teacher, model.eval()):
        handle = network.neck.register_forward_hook(lambda *args: maps.append(args[2]))
        with torch.no_grad():
            network(x)
        handle.remove()
    error = float((maps[1] - maps[0]).square().sum() / maps[0].square().sum())
    assert gate['feature_error'] == pytest.approx(error, rel=1e-3) and 'kl' not in gate


class Silent(nn.Module):
    """Gives no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(4, 4), nn.ReLU()

    def forward(self, x: Tensor) -> str:
        return str(self.act(self.fc(x)).shape)


def test_a_model_without_features_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Silent(), torch.randn(8, 4)
    gplq_mm.quantize(model, {'calibration': dict(num_images=8)})
    with caplog.at_level(logging.INFO, 'gplq_mm'):
        assert gplq_mm.calibrate(model, [x]).gate == {}
    assert any('gate: skipped' in record.getMessage() for record in caplog.records)
