# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Each key, changed alone, changes what is built, trained, calibrated or reported."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from mmengine.config import ConfigDict
from mmengine.optim import build_optim_wrapper
from torch import nn

from gplq_mm.analysis.gate.gate_result import GateResult
from gplq_mm.analysis.report import scope_line
from gplq_mm.analysis.start_error import StartFigures
from gplq_mm.convert import convert_, make_matmul, quantizers, register_handler
from gplq_mm.convert.handlers import HANDLERS
from gplq_mm.distillation.drop_rates import set_drop_rates_
from gplq_mm.distillation.mimic_settings import resolve_mimic
from gplq_mm.distillation.trainable import choose_trained_
from gplq_mm.integrations.mm import session
from gplq_mm.integrations.mm.data.calibration_data import CalibrationSet
from gplq_mm.integrations.mm.optim import shorten_lr_
from gplq_mm.integrations.mm.run import start_check, weight_stage
from gplq_mm.ops import swap_class
from gplq_mm.ptq import build_weight_ptq
from gplq_mm.ptq.stage2_recipe import resolve_compensation
from gplq_mm.recipe import Recipe, as_recipe, settle_auto
from tests.helpers.models import Attention, Detector, QuantAttention
from tests.test_recipe.test_fuzz import LEAVES, RULE_LEAVES, put

OTHER: dict[str, Any] = {
    'name': 'another',
    'scope': 'all',
    'activation.enabled': False,
    'activation.num_bits': 5,
    'activation.signed': False,
    'activation.symmetric': True,
    'activation.observer': 'minmax',
    'activation.observer_args': {'bins': 99},
    'activation.learn_scale': False,
    'activation.granularity': 'per_tensor',
    'activation.codes': 'auto',
    'weight.enabled': False,
    'weight.num_bits': 5,
    'weight.signed': False,
    'weight.symmetric': False,
    'weight.observer': 'mse',
    'weight.observer_args': {'percentile': 0.9},
    'weight.learn_scale': True,
    'weight.granularity': 'per_tensor',
    'weight.ptq': 'mse',
    'weight.qat': True,
    'calibration.num_images': 7,
    'calibration.seed': 3,
    'calibration.batch_size': 3,
    'calibration.all_if_fewer': False,
    'calibration.migrate': False,
    'calibration.compensate': False,
    'mimic.type': 'logits',
    'mimic.loss_weight': 2.0,
    'mimic.task_weight': 0.5,
    'mimic.layer': 'backbone',
    'mimic.temperature': 2.0,
    'mimic.explained_variance': 0.3,
    'mimic.num_images': 9,
    'optim.lr': 0.5,
    'optim.lr_iterations': 80,
    'optim.scale_lr': 0.5,
    'optim.vector_lr': 0.5,
    'optim.weight_decay': 0.5,
    'optim.scale_weight_decay': 0.5,
    'optim.betas': [0.1, 0.2],
    'optim.train': 'attention',
    'optim.drop_rates': 'keep',
    'optim.scale_step': 'absolute',
    'stage2.compensation.type': 'auto',
    'stage2.compensation.blocks': ['x'],
    'stage2.compensation.ridge': 0.5,
    'stage2.compensation.target': 'block',
    'stage2.num_images': 9,
    'gate.num_images': 9,
    'gate.max_feature_error': 0.25,
    'gate.action': 'warn',
}
"""Another value for each key."""
GRID = {'qat': True, 'learn_scale': True}
GIVEN: dict[str, dict[str, Any]] = {
    'activation.codes': {
        'activation': {'signed': False, 'symmetric': True, 'granularity': 'per_tensor'}
    },
    'weight.observer': {'weight': GRID},
    'weight.observer_args': {'weight': {**GRID, 'observer': 'percentile'}},
    'mimic.layer': {'mimic': {'type': 'feature'}},
    'mimic.explained_variance': {'mimic': {'type': 'pca'}},
    'mimic.num_images': {'mimic': {'type': 'pca'}},
    'optim.scale_weight_decay': {'optim': {'scale_step': 'absolute'}},
    'stage2.compensation.type': {'stage2': {'compensation': {'type': 'qwt'}}},
}
"""What a key needs beside it to count."""
WITH = {'weight.qat': {'weight.learn_scale': True}, 'weight.learn_scale': {'weight.qat': True}}
"""Keys that change together: one is refused without the other."""
RULE_OTHER: dict[str, Any] = {
    **{k: v for k, v in OTHER.items() if k.startswith(('activation.', 'weight.'))},
    'num_bits': 6,
    'enabled': False,
}
del RULE_OTHER['weight.ptq']


class Drops(Detector):
    """The detector with a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.3)


@pytest.fixture(autouse=True)
def attention_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('gplq_mm.convert.handlers.HANDLERS', dict(HANDLERS))

    @register_handler(Attention)
    def convert_attention(module: Any, name: str, context: Any) -> None:
        qk = make_matmul(f'{name}.qk_matmul', context, ('query', 'key'), 1)
        pv = make_matmul(f'{name}.pv_matmul', context, ('softmax', 'value'), 1)
        if qk is not None and pv is not None:
            swap_class(module, QuantAttention)
            module.qk_matmul, module.pv_matmul = qk, pv


def built(recipe: Recipe) -> tuple[Any, dict[str, Any]]:
    """The converted model and what there is to see of it."""
    model: Any = Drops()
    coverage = convert_(model, recipe)
    choose_trained_(model, recipe.optim.train)
    set_drop_rates_(model, recipe.optim.drop_rates)
    model.gplq = SimpleNamespace(recipe=recipe, coverage=coverage)
    seen = {
        'line': scope_line({'recipe': recipe.as_dict(), 'coverage': coverage.as_dict()}),
        'coverage': coverage.as_dict(),
        'specs': {name: str(q.spec) for name, q in quantizers(model).items()},
        'trained': [name for name, p in model.named_parameters() if p.requires_grad],
        'dropout': model.dropout.p,
    }
    return model, seen


def optimizer_of(model: Any) -> Any:
    config = dict(constructor='gplq_mm.GPLQOptimWrapperConstructor')
    wrapper = build_optim_wrapper(model, ConfigDict(config))
    runner = SimpleNamespace(
        optim_wrapper=wrapper, param_schedulers=[], max_iters=20, _train_loop=None
    )
    given = wrapper.optimizer.param_groups
    groups = [{k: v for k, v in group.items() if k != 'params'} for group in given]
    hooks = len(wrapper.optimizer._optimizer_step_post_hooks)
    return groups, hooks, shorten_lr_(runner, model)


class Images(CalibrationSet):
    """Draws nothing; keeps what it was asked for."""

    def __init__(self, *asked: Any) -> None:
        self.asked = asked[1:]
        self.dataset, self.indices, self.batches = range(1000), range(8), [range(2)]

    def log(self) -> None:
        pass

    def run_pass(self, model: Any, title: str, passes: int = 0) -> Any:
        return None

    def sample(self, *asked: Any) -> 'Images':
        return self

    def __iter__(self) -> Any:
        return iter([None])


class FailedGate:
    """Never passed, but for its figures' sake."""

    def __init__(self, model: Any, images: Any, state: Any, settings: Any) -> None:
        self.settings, self.model = settings, model

    def unavailable(self) -> None:
        return None

    def measure(self) -> GateResult:
        figures = StartFigures(1e9, (1e9,))
        return GateResult(self.settings.num_images, self.settings.max_feature_error, figures)


def run_of(model: Any, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What calibration, gate and stage 2 are called with."""
    seen: list[Any] = []
    report = SimpleNamespace(update=lambda *a, **k: None)
    result = SimpleNamespace(summary=list, as_dict=dict)
    meter = SimpleNamespace(seconds=0.0)
    for name, value in {
        'StageMeter': lambda: nullcontext(meter),
        'require_runs': lambda *a: None,
        'calibrate_activations': lambda *a: 0,
        'calibrate_trained_weights': lambda *a: 0,
        'calibrate_layerwise': lambda *a, migrate, compensate_weights, **k: (
            seen.append((migrate, compensate_weights)) or result
        ),
    }.items():
        monkeypatch.setattr(session, name, value)
    monkeypatch.setattr(start_check, 'gate_of_run', FailedGate)
    images = Images.of_recipe(ConfigDict(), recipe)
    seen.append(images.asked)
    run: Any = session.GPLQSession.__new__(session.GPLQSession)
    run.model, run.calibration, run.report = model, images, report
    run._calibrate()
    try:
        start_check.check_start(SimpleNamespace(model=model), images, {}, report, lambda: None)  # type: ignore[arg-type]
    except ValueError as error:
        seen.append(str(error))
    monkeypatch.setattr(weight_stage, 'CalibrationSet', Images)
    seen.append(weight_stage.stage2_set(ConfigDict(), recipe, images).asked)
    return seen


def effects(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All that a recipe decides, as far as a run can be looked at without running."""
    recipe = settle_auto(as_recipe({'scope': ['backbone'], **given}), is_detector=False)
    if not recipe.activation.enabled:
        with pytest.raises(ValueError, match='nothing was quantized'):
            built(recipe)
        return []
    model, seen = built(recipe)
    algorithms = [(type(a), vars(a)) for a in build_weight_ptq(recipe.weight.ptq)]
    compensation = resolve_compensation(model, recipe)
    return [
        seen,
        optimizer_of(model),
        run_of(model, recipe, monkeypatch),
        resolve_mimic(recipe.mimic, is_detector=False),
        algorithms,
        compensation,
    ]


def test_every_key_has_another_value() -> None:
    assert {'.'.join(path) for path, *_ in LEAVES} == set(OTHER)
    changed = {'name', 'role', 'optional'} | set(RULE_OTHER)
    assert {'.'.join(path) for path, *_ in RULE_LEAVES} == changed


@pytest.mark.parametrize('key', OTHER)
def test_a_key_changed_alone_has_an_effect(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = (copy.deepcopy(GIVEN.get(key, {})) for _ in range(2))
    for name, value in {key: OTHER[key], **WITH.get(key, {})}.items():
        put(after, tuple(name.split('.')), value)
    assert effects(before, monkeypatch) != effects(after, monkeypatch)


@pytest.mark.parametrize('key', sorted(RULE_OTHER))
def test_a_rules_key_has_an_effect(key: str) -> None:
    base, _, name = key.rpartition('.')
    given = GIVEN.get(key, {}).get(base, {})
    pair = {other.rpartition('.')[2]: v for other, v in WITH.get(key, {}).items()}
    value = {**given, **pair, name: RULE_OTHER[key]}
    rules = [{'name': '*.ffn.*', **({base: v} if base else v)} for v in (given, value) if v]
    plain_model = built(settle_auto(dict(scope=['backbone'], rules=rules[:-1]), False))[1]
    assert built(settle_auto(dict(scope=['backbone'], rules=rules), False))[1] != plain_model
