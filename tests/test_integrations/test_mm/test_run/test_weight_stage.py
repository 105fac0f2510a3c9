# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Stage 2 alone repeats what the whole run did."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.runner import Runner
from torch import nn

from gplq_mm.calibration.activation_ranges import calibrate_trained_weights
from gplq_mm.convert import convert_, quantized_layers
from gplq_mm.integrations.mm.checkpoints.checkpoint_io import read_checkpoint
from gplq_mm.integrations.mm.run import weight_stage
from gplq_mm.recipe import as_recipe
from tests.helpers.gplq_runs import assert_same_weights, report, weights
from tests.helpers.runners import gplq_config, make_runner
from tests.test_integrations.test_mm.conftest import FinishedRun


def loaded(finished: FinishedRun, work_dir: Path, name: str) -> Runner:
    """As tools/ptq.py prepares it."""
    runner = make_runner(gplq_config(finished.project, finished.work_dir / name, work_dir))
    runner.call_hook('before_run')
    runner.load_checkpoint(str(finished.work_dir / name))
    return runner


@pytest.fixture
def runner(finished: FinishedRun, tmp_path: Path) -> Runner:
    return loaded(finished, tmp_path, 'gplq_stage1.pth')


def test_stage_2_alone_gives_the_runs_checkpoint_and_metrics(
    finished: FinishedRun, runner: Runner, tmp_path: Path
) -> None:
    found = weight_stage.run(runner).data['stage2']['metrics']
    assert found == report(finished.work_dir)['stage2']['metrics']
    assert_same_weights(tmp_path / 'gplq_final.pth', finished.work_dir / 'gplq_final.pth')
    ours, theirs = (read_checkpoint(d / 'gplq_final.pth') for d in (tmp_path, finished.work_dir))
    assert ours['gplq'] == theirs['gplq']
    assert ours['meta']['dataset_meta'] == theirs['meta']['dataset_meta']
    content = report(tmp_path)
    for key in ('bops', 'model_bytes', 'feature_error'):
        assert content['stage2'][key] == report(finished.work_dir)['stage2'][key]


def test_another_algorithm_is_recorded_and_changes_weights(
    finished: FinishedRun, runner: Runner, tmp_path: Path
) -> None:
    out = tmp_path / 'sub' / 'mine.pth'
    weight_stage.run(runner, ptq='percentile', out=str(out))
    told = read_checkpoint(out)['gplq']
    assert (told['stage'], told['recipe']['weight']['ptq']) == ('stage2', 'percentile')
    assert runner.model.gplq.recipe.weight.ptq == 'minmax'
    assert json.loads(out.with_name('mine_report.json').read_text())['recipe'] == told['recipe']
    ours, theirs = weights(out), weights(finished.work_dir / 'gplq_final.pth')
    assert any(not ours[k].equal(theirs[k]) for k in ours)
    assert not (tmp_path / 'gplq_final.pth').exists()


def test_fine_tuning_has_the_float_model_and_other_training_images(
    finished: FinishedRun, runner: Runner, tmp_path: Path
) -> None:
    ptq = [dict(type='gptq', guided=0.5), dict(type='finetune', num_images=64, lr=0.01)]
    found = weight_stage.run(runner, ptq=ptq).data['stage2']
    assert not any('no float model' in note for note in found['notes'])
    own, rounded = weights(tmp_path / 'gplq_final.pth'), tmp_path / 'rounded.pth'
    weight_stage.run(loaded(finished, tmp_path, 'gplq_stage1.pth'), ptq=ptq[:1], out=str(rounded))
    moved = {key for key, value in weights(rounded).items() if not value.equal(own[key])}
    assert moved and all(key.endswith(('.bias', '.weight')) for key in moved)
    codes = {f'{n}.weight' for n in quantized_layers(runner.model)}
    assert not moved & codes


def test_fine_tuning_without_the_float_checkpoint_says_so(
    finished: FinishedRun, runner: Runner
) -> None:
    for hook in runner.hooks:
        if hasattr(hook, 'source'):
            hook.source = {**hook.source, 'path': 'gone.pth'}
    notes = weight_stage.run(runner, ptq=['minmax', 'finetune']).data['stage2']['notes']
    assert 'there is no float model' in notes[0]


def test_an_algorithm_that_needs_no_float_model_does_not_read_it(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Any] = []
    model = runner.model
    model.gplq.recipe = model.gplq.recipe.change(gate=None)  # it would measure the feature error
    monkeypatch.setattr(weight_stage, 'read_float', read.append)
    weight_stage.run(runner, ptq='mse')
    assert not read


def test_with_another_float_checkpoint_the_feature_error_is_left_out(
    finished: FinishedRun, runner: Runner, tmp_path: Path
) -> None:
    other = tmp_path / 'other.pth'
    other.write_bytes(b'retrained')
    for hook in runner.hooks:
        if hasattr(hook, 'source'):
            hook.source = {**hook.source, 'path': str(other)}
    assert 'feature_error' not in weight_stage.run(runner).data['stage2']
    assert_same_weights(tmp_path / 'gplq_final.pth', finished.work_dir / 'gplq_final.pth')


def test_an_unknown_algorithm_is_refused(runner: Runner) -> None:
    with pytest.raises(ValueError, match='gptqq'):
        weight_stage.run(runner, ptq='gptqq')


def test_weights_are_quantized_once_only(finished: FinishedRun, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match='weights are already quantized; load the stage-1 checkpoint'
    ):
        weight_stage.run(loaded(finished, tmp_path, 'gplq_final.pth'))


def test_a_float_checkpoint_is_refused(finished: FinishedRun, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='holds no GPLQ state'):
        loaded(finished, tmp_path, '../fp32.pth')


def partly_trained(rule: dict[str, Any]) -> Any:
    """Two layers, of which a rule puts the first on its grid."""
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    grid = dict(name='0', weight=dict(qat=True, learn_scale=True, **rule))
    recipe = as_recipe(dict(rules=[grid]))
    convert_(model, recipe)
    model.gplq = SimpleNamespace(recipe=recipe)
    return model


def test_bits_of_weights_that_a_rule_trains_on_their_grid_are_fixed() -> None:
    with pytest.raises(ValueError, match='trained on their grid .* first 0: their bits are fixed'):
        weight_stage.set_weight_bits(partly_trained({}), 3)
    model = partly_trained(dict(num_bits=6))
    weight_stage.set_weight_bits(model, 3)
    assert [layer.weight_quantizer.spec.num_bits for layer in model] == [6, 3]


def test_a_stage_1_with_weights_on_their_grid_is_not_taken_for_a_stage_2() -> None:
    model = partly_trained({})
    calibrate_trained_weights(model)
    weight_stage._require_stage1(model)
    model[1].weight_quantizer.set_qparams(torch.ones(4), torch.zeros(4))
    with pytest.raises(ValueError, match='1.weight_quantizer: the weights are already quantized'):
        weight_stage._require_stage1(model)
