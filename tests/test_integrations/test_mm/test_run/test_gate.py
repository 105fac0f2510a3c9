# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The gate before stage 1: what it looks at, what it says, and what a run does then."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.runner import Runner

from gplq_mm.convert import quantizers
from gplq_mm.integrations.mm.data import calibration_data
from gplq_mm.integrations.mm.data.calibration_data import CalibrationSet
from gplq_mm.integrations.mm.run import start_check
from tests.helpers.gplq_runs import report, weights, write_gplq_config
from tests.helpers.runners import RECIPE, gplq_config, make_runner
from tests.helpers.tiny_projects import TinyProject, our_tool, run_python

TWO_BITS = {'num_bits': 2, 'observer': 'minmax'}
STRICT = {'max_feature_error': 1e-3}
"""No 2-bit start reaches it."""


def recipe(base: str = 'w4a4', **gate: Any) -> dict[str, Any]:
    return {**RECIPE, 'base': base, 'activation': TWO_BITS, 'gate': {**STRICT, **gate}}


def calibrated(cfg: Any) -> Runner:
    """A runner that trained no epoch."""
    cfg.train_cfg.max_epochs = 0
    runner = make_runner(cfg)
    runner.train()
    return runner


def gate_of(work_dir: Path) -> dict[str, Any]:
    return report(work_dir)['calibration']['gate']


def test_a_start_that_passes_is_one_line_and_stands_in_the_report(
    project: TinyProject, fp32: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {**RECIPE, 'gate': {'num_images': 6}}
    calibrated(gplq_config(project, fp32, tmp_path, settings, log_level='INFO'))
    found = gate_of(tmp_path)
    assert (found['images'], found['limit'], found['passed']) == (6, 0.5, True)
    assert 0 < found['feature_error'] == found['levels'][0] < 0.5
    assert found['kl'] >= 0 and 0.5 <= found['agreement'] <= 1
    assert 'roles' not in found
    log = next(tmp_path.rglob('*.log')).read_text()
    assert log.count('gate: feature error') == 1
    line = f'feature error {found["feature_error"]:.2g} (limit 0.5), agreement'
    assert f'gate: {line}' in log and 'on 6 training images' in log
    assert f'calibrated: {line}' in log


def test_a_broken_start_stops_before_the_first_step(
    project: TinyProject, fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = make_runner(gplq_config(project, fp32, tmp_path, recipe()))
    monkeypatch.setattr(type(runner.model), 'train_step', lambda *_, **__: pytest.fail('a step'))
    with pytest.raises(ValueError, match=r'too far from the float one.*largest error') as caught:
        runner.train()
    assert runner.iter == 0
    found = gate_of(tmp_path)
    assert not found['passed']
    errors = [r['feature_error'] for r in found['roles']]
    assert errors == sorted(errors)
    active = quantizers(runner.model, 'activation').values()
    assert {r['role'] for r in found['roles']} == {q.role for q in active}
    for role in found['roles'][:2]:
        assert f"dict(role='{role['role']}', num_bits=8)" in str(caught.value)
    assert '\n' not in str(caught.value)
    assert not (tmp_path / 'gplq_calibrated.pth').exists()
    assert all(q.is_active for q in active)


def test_ruined_scales_stop_and_their_role_is_named_first(
    project: TinyProject, fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = start_check.check_start

    def ruined(runner: Runner, *args: Any) -> None:
        for quantizer in quantizers(runner.model, 'activation').values():
            if quantizer.role == 'post_gelu':
                quantizer.set_qparams(quantizer.scale.detach() * 1e4, quantizer.zero_point)
        check(runner, *args)

    monkeypatch.setattr('gplq_mm.integrations.mm.session.check_start', ruined)
    settings = {**RECIPE, 'base': 'w8a8', 'gate': {'max_feature_error': 0.005}}
    with pytest.raises(
        ValueError, match=r'the largest error: post_gelu \(feature error .* 2 operands'
    ):
        calibrated(gplq_config(project, fp32, tmp_path, settings))


def test_the_tool_says_it_in_one_line(project: TinyProject, fp32: Path) -> None:
    text = repr(recipe())
    config = write_gplq_config(project, fp32, 'gate_stop', text)
    done = run_python(our_tool('train'), config, '--work-dir', 'gate_stop', cwd=project.root)
    assert done.returncode == 2, done.stderr[-2000:]
    assert 'Traceback' not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert len(errors) == 1
    assert "gate=dict(action='warn')" in errors[0] and 'feature error' in errors[0]
    assert '| role ' in done.stdout + done.stderr


def test_a_warning_trains(project: TinyProject, fp32: Path, tmp_path: Path) -> None:
    make_runner(gplq_config(project, fp32, tmp_path, recipe(action='warn'))).train()
    assert report(tmp_path)['stage1']['iterations'] == 10
    assert not gate_of(tmp_path)['passed']
    log = next(tmp_path.rglob('*.log')).read_text()
    assert 'WARNING - gate: the calibrated model is too far' in log
    assert (tmp_path / 'gplq_final.pth').exists()


def test_without_a_gate_nothing_is_measured(
    project: TinyProject, fp32: Path, tmp_path: Path
) -> None:
    calibrated(gplq_config(project, fp32, tmp_path, {**recipe(), 'gate': None}))
    assert 'gate' not in report(tmp_path)['calibration']


def test_only_training_images_that_calibration_did_not_see_are_read(
    project: TinyProject, fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: dict[str, set[str]] = {'calibration': set(), 'gate': set()}
    stage = ['calibration']
    get, check = calibration_data.CalibrationSet.load, start_check.check_start

    def load(images: CalibrationSet, number: int) -> Any:
        read['gate'] |= {os.path.realpath(str(images.paths[i])) for i in range(len(images.paths))}
        return get(images, number)

    def checked(runner: Runner, images: CalibrationSet, *args: Any) -> None:
        read['calibration'] |= {str(path) for path in images.paths}
        stage[0] = 'gate'
        check(runner, images, *args)
        stage[0] = 'after'

    from mmpretrain.datasets.transforms import LoadImageFromFile

    transform = LoadImageFromFile.transform

    def watched(self: Any, results: dict) -> Any:
        if stage[0] == 'gate':
            read.setdefault('pixels', set()).add(os.path.realpath(results['img_path']))
        return transform(self, results)

    monkeypatch.setattr(LoadImageFromFile, 'transform', watched)
    monkeypatch.setattr(CalibrationSet, 'load', load)
    monkeypatch.setattr('gplq_mm.integrations.mm.session.check_start', checked)
    calibrated(gplq_config(project, fp32, tmp_path))
    assert len(read['pixels']) == 32
    assert read['pixels'] == read['gate']
    assert all('/train/' in path for path in read['pixels'])
    assert not read['pixels'] & read['calibration']


def test_the_gate_changes_nothing_of_a_run_that_passes(
    project: TinyProject, fp32: Path, tmp_path: Path
) -> None:
    work_dirs = [tmp_path / 'with', tmp_path / 'without']
    for work_dir, gate in zip(work_dirs, ({'num_images': 8}, None), strict=True):
        calibrated(gplq_config(project, fp32, work_dir, {**RECIPE, 'gate': gate}))
    one, two = (weights(d / 'gplq_calibrated.pth') for d in work_dirs)
    assert set(one) == set(two)
    assert [k for k in one if not torch.equal(one[k], two[k])] == []


def test_a_model_that_gives_no_features_is_left_alone(
    project: TinyProject,
    fp32: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any) -> None:
        raise KeyError('no such output')

    monkeypatch.setattr('gplq_mm.integrations.mm.run.gate.start_outputs', broken)
    calibrated(gplq_config(project, fp32, tmp_path, recipe(), log_level='INFO'))
    assert 'gate' not in report(tmp_path)['calibration']
    assert 'gate: skipped' in next(tmp_path.rglob('*.log')).read_text()
