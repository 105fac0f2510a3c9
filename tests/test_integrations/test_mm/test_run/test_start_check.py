# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""``recipe='auto'``: bits are added where the gate is not passed, and travel in checkpoints."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.registry import DefaultScope
from mmengine.runner import load_checkpoint

from gplq_mm.convert import quantizers, resolve_recipe
from gplq_mm.registry import MODELS
from tests.helpers.gplq_runs import assert_same_weights, report, weights
from tests.helpers.runners import RECIPE, gplq_config, make_runner
from tests.helpers.tiny_projects import TinyProject

EMA = dict(type='EMAHook', momentum=0.25)
AUTO = {
    **RECIPE,
    'base': 'auto',
    'name': 'auto',
    'activation': {'num_bits': 2, 'observer': 'minmax'},
    'gate': {'max_feature_error': 0.1},
}
"""Begins with 2 bits, so that the tiny model's start is broken."""
OWN_RULES = len(resolve_recipe(AUTO)['rules'])


@dataclass(frozen=True)
class AutoRun:
    """A finished run with an EMA, whose gate added bits."""

    project: TinyProject
    work_dir: Path
    runner: Any


@pytest.fixture(scope='module')
def auto(project: TinyProject, fp32: Path) -> AutoRun:
    work_dir = project.root / 'auto'
    cfg = gplq_config(project, fp32, work_dir, AUTO, hooks=(EMA,), log_level='INFO')
    runner = make_runner(cfg)
    runner.train()
    return AutoRun(project, work_dir, runner)


def activation_bits(model: Any) -> dict[str, int]:
    return {n: q.spec.num_bits for n, q in quantizers(model, 'activation').items()}


def test_the_steps_stand_in_the_report(auto: AutoRun) -> None:
    gate = report(auto.work_dir)['calibration']['gate']
    assert gate['passed'] and gate['feature_error'] <= 0.1
    first, *added = gate['steps']
    assert first['bits'] == {} and first['feature_error'] > 0.1
    assert [set(step['bits'].values()) for step in added] == [{6}, {8}][: len(added)]
    assert len(added[0]['bits']) == 2
    assert all(step['bits'].keys() == added[0]['bits'].keys() for step in added)
    assert added[-1]['feature_error'] == gate['feature_error']
    bops = [step['bops'] for step in gate['steps']]
    assert bops == sorted(bops) and bops[0] < bops[-1]
    log = next(auto.work_dir.rglob('*.log')).read_text()
    assert log.count('G bit operations instead of') == len(added)
    assert 'W32Amix' in log


def test_the_costliest_roles_got_the_bits_and_the_recipe_says_so(auto: AutoRun) -> None:
    content = report(auto.work_dir)
    chosen = content['calibration']['gate']['steps'][-1]['bits']
    assert content['recipe'] == auto.runner.model.gplq.recipe.as_dict()
    assert content['recipe']['name'] == 'auto'
    assert content['recipe']['rules'][OWN_RULES:] == [
        {'role': role, 'activation': {'num_bits': bits}} for role, bits in chosen.items()
    ]
    for quantizer in quantizers(auto.runner.model, 'activation').values():
        expected = chosen.get(quantizer.role, 8 if quantizer.role in ('image', 'predictor') else 2)
        assert quantizer.spec.num_bits == expected


@pytest.mark.parametrize('name', ['gplq_calibrated.pth', 'gplq_stage1.pth', 'gplq_final.pth'])
def test_checkpoints_hold_the_rules(auto: AutoRun, name: str) -> None:
    held = torch.load(auto.work_dir / name, weights_only=True)['gplq']['recipe']
    assert held == report(auto.work_dir)['recipe']


def test_the_final_checkpoint_is_tested_under_auto(auto: AutoRun, tmp_path: Path) -> None:
    final = auto.work_dir / 'gplq_final.pth'
    runner = make_runner(gplq_config(auto.project, final, tmp_path, AUTO))
    assert runner.test() == report(auto.work_dir)['stage2']['metrics']
    assert activation_bits(runner.model) == activation_bits(auto.runner.model)


def test_a_model_built_by_itself_loads_it(auto: AutoRun, tmp_path: Path) -> None:
    final = auto.work_dir / 'gplq_final.pth'
    cfg = gplq_config(auto.project, None, tmp_path, AUTO)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
    load_checkpoint(model, str(final), map_location='cpu')
    assert activation_bits(model) == activation_bits(auto.runner.model)
    image = torch.rand(2, 3, 32, 32)
    expected = auto.runner.model.eval()
    assert torch.equal(model.eval()(image, mode='tensor'), expected(image, mode='tensor'))


def test_a_run_resumed_after_the_gate_is_the_same(auto: AutoRun, tmp_path: Path) -> None:
    start = auto.work_dir / 'gplq_calibrated.pth'
    cfg = gplq_config(auto.project, start, tmp_path, AUTO, hooks=(EMA,), resume=True)
    make_runner(cfg).train()
    assert_same_weights(tmp_path / 'gplq_final.pth', auto.work_dir / 'gplq_final.pth')


def test_a_recipe_that_names_the_bits_calibrates_to_the_same(
    auto: AutoRun, fp32: Path, tmp_path: Path
) -> None:
    rules = report(auto.work_dir)['recipe']['rules'][OWN_RULES:]
    cfg = gplq_config(auto.project, fp32, tmp_path, {**AUTO, 'rules': rules})
    cfg.train_cfg.max_epochs = 0
    make_runner(cfg).train()
    one = weights(tmp_path / 'gplq_calibrated.pth')
    held = torch.load(auto.work_dir / 'gplq_calibrated.pth', weights_only=True)
    two = held['ema_state_dict']  # the hook saves the model's own weights under the average's name
    assert [n for n in one if not torch.equal(one[n], two[f'module.{n}'])] == []


def test_it_stops_where_no_bits_are_enough(
    project: TinyProject, fp32: Path, tmp_path: Path
) -> None:
    settings = {**AUTO, 'gate': {'max_feature_error': 1e-7}}
    runner = make_runner(gplq_config(project, fp32, tmp_path, settings))
    with pytest.raises(ValueError, match='too far from the float one'):
        runner.train()
    gate = report(tmp_path)['calibration']['gate']
    assert not gate['passed'] and gate['roles']
    assert [list(step['bits'].values()) for step in gate['steps']] == [[], [6, 6], [8, 8]]
    assert runner.iter == 0


def test_a_start_that_passes_keeps_four_bits(
    project: TinyProject, fp32: Path, tmp_path: Path
) -> None:
    settings = {**RECIPE, 'base': 'auto', 'name': 'auto'}
    cfg = gplq_config(project, fp32, tmp_path, settings)
    cfg.train_cfg.max_epochs = 0
    make_runner(cfg).train()
    content = report(tmp_path)
    assert 'steps' not in content['calibration']['gate']
    assert content['recipe']['rules'] == resolve_recipe('auto')['rules']
