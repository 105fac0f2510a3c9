# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The hook: what a run leaves, and what it refuses before long work."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.runner import Runner

from gplq_mm.integrations.mm.checkpoints.checkpoint_io import read_checkpoint
from gplq_mm.integrations.mm.hook import GPLQHook
from gplq_mm.integrations.mm.session import recall_source
from gplq_mm.ops import QuantLinear
from tests.helpers.gplq_runs import report, weights
from tests.helpers.pages import read_page
from tests.helpers.runners import RECIPE, float_config, gplq_config, make_runner, save_float
from tests.helpers.tiny_projects import CLASSES, TinyProject
from tests.test_integrations.test_mm.conftest import FinishedRun


def test_report_holds_every_stage(finished: FinishedRun) -> None:
    content = report(finished.work_dir)
    stages = ('fp32', 'calibration', 'stage1', 'stage2')
    settings = ('recipe', 'coverage', 'versions', 'seed', 'engine', 'validation')
    assert {*stages, *settings, 'command', 'logs', 'operands'} == set(content)
    assert content['engine'].startswith('engine fused')
    for stage in ('fp32', 'stage1', 'stage2'):
        assert 'accuracy/top1' in content[stage]['metrics']
        for key in ('bops', 'model_bytes', 'seconds', 'peak_memory_bytes'):
            assert content[stage][key] > 0, (stage, key)
    assert content['stage1']['iterations'] == 10
    assert content['calibration']['quantizers'] > 0
    assert content['seed'] == 3


def test_the_page_has_the_figures_of_the_report(finished: FinishedRun) -> None:
    pytest.importorskip('vl_convert')
    content, page = report(finished.work_dir), read_page(finished.work_dir / 'gplq_report.html')
    for stage in ('fp32', 'stage1', 'stage2'):
        for name, value in content[stage]['metrics'].items():
            assert page.values[name, stage] == value
        assert set(content[stage]['per_class']) == set(CLASSES)
        mean = sum(content[stage]['per_class'].values()) / len(CLASSES)  # classes of equal size
        assert mean == pytest.approx(content[stage]['metrics']['accuracy/top1'])
    assert content['stage1']['scales'][0]['octaves'] > 0
    assert len(content['stage2']['weights']['histograms']) > 1
    assert 2 < content['stage2']['mean_bits']['weight'] < 8
    assert 'validation images compared' in page.text
    assert 'reloads itself' not in page.text


def test_save_best_takes_the_stage_1_metric(finished: FinishedRun) -> None:
    best = list(finished.work_dir.glob('best_accuracy_top1_epoch_1.pth'))
    assert len(best) == 1
    checkpoint = read_checkpoint(best[0])
    score = finished.runner.message_hub.get_info('best_score')
    assert score == report(finished.work_dir)['stage1']['metrics']['accuracy/top1']
    assert checkpoint['gplq']['stage'] == 'stage1'
    weight_keys = [k for k in checkpoint['state_dict'] if 'weight_quantizer.calibrated' in k]
    assert weight_keys
    assert not any(checkpoint['state_dict'][k] for k in weight_keys)


@pytest.mark.parametrize(
    ('name', 'stage'),
    [
        ('gplq_calibrated.pth', 'calibrated'),
        ('epoch_1.pth', 'stage1'),
        ('gplq_stage1.pth', 'stage1'),
        ('gplq_final.pth', 'stage2'),
    ],
)
def test_every_checkpoint_states_what_it_is(finished: FinishedRun, name: str, stage: str) -> None:
    told = read_checkpoint(finished.work_dir / name)['gplq']
    assert told['stage'] == stage
    assert told['recipe']['name'].startswith('w4a4')
    assert told['float_checkpoint']['path'] == str(finished.checkpoint)
    assert len(told['float_checkpoint']['sha256']) == 64


def test_calibration_fits_the_weights_of_quantized_linear_layers_alone(
    finished: FinishedRun,
) -> None:
    fp32 = read_checkpoint(finished.checkpoint)['state_dict']
    calibrated = weights(finished.work_dir / 'gplq_calibrated.pth')
    changed = {k.rpartition('.')[0] for k, v in fp32.items() if not torch.equal(calibrated[k], v)}
    linear = {
        name
        for name, module in finished.runner.model.named_modules()
        if isinstance(module, QuantLinear)
    }
    assert changed and changed <= linear


def test_calibration_without_compensation_leaves_the_float_weights_alone(
    project: TinyProject, fp32: Path, tmp_path: Path
) -> None:
    recipe = {**RECIPE, 'calibration': {'num_images': 4, 'compensate': False}}
    cfg = gplq_config(project, fp32, tmp_path, recipe)
    cfg.train_cfg.max_epochs = 0
    make_runner(cfg).train()
    calibrated = weights(tmp_path / 'gplq_calibrated.pth')
    assert all(
        torch.equal(calibrated[k], v) for k, v in read_checkpoint(fp32)['state_dict'].items()
    )


def train(cfg: Any) -> Runner:
    runner = make_runner(cfg)
    runner.train()
    return runner


def test_a_missing_load_from_is_named(project: TinyProject, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='load_from'):
        train(gplq_config(project, None, tmp_path))
    assert not (tmp_path / 'gplq_calibrated.pth').exists()


def test_a_load_from_that_is_not_there_is_named(project: TinyProject, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'nowhere\.pth'):
        train(gplq_config(project, tmp_path / 'nowhere.pth', tmp_path))


def test_nan_in_the_fp32_weights_is_named_at_once(project: TinyProject, tmp_path: Path) -> None:
    key = 'backbone.layers.1.ffn.layers.1.weight'
    fp32 = save_float(project, tmp_path / 'nan.pth', lambda s: s[key][0].fill_(float('nan')))
    with pytest.raises(ValueError, match=f'NaN or infinity in: {key}'):
        train(gplq_config(project, fp32, tmp_path))
    assert 'fp32' not in (report(tmp_path) if (tmp_path / 'gplq_report.json').exists() else {})


def test_nan_that_arises_in_calibration_names_the_quantizer(
    project: TinyProject, tmp_path: Path
) -> None:
    key = 'backbone.layers.0.ffn.layers.0.0.weight'
    fp32 = save_float(project, tmp_path / 'huge.pth', lambda s: s[key].fill_(3e38))
    with pytest.raises(ValueError, match=r'backbone\.layers\.0\.ffn\S*input_quantizer.*NaN'):
        train(gplq_config(project, fp32, tmp_path))


def test_a_fp32_checkpoint_of_another_model_is_refused(
    project: TinyProject, tmp_path: Path
) -> None:
    fp32 = save_float(project, tmp_path / 'other.pth', lambda s: s.pop('backbone.cls_token'))
    with pytest.raises(ValueError, match=r'missing keys: backbone\.cls_token'):
        train(gplq_config(project, fp32, tmp_path))


def test_a_float_model_under_the_hook_is_refused(project: TinyProject, tmp_path: Path) -> None:
    cfg = gplq_config(project, None, tmp_path)
    cfg.model, cfg.optim_wrapper = float_config(project).model, float_config(project).optim_wrapper
    with pytest.raises(TypeError, match=r"ImageClassifier was not built by type='gplq_mm\.GPLQ'"):
        train(cfg)


def loading(finished: FinishedRun, resume: bool, name: str) -> GPLQHook:
    hook = GPLQHook()
    hook.session = object()  # type: ignore[assignment]
    runner: Any = SimpleNamespace(
        model=finished.runner.model, cfg=finished.runner.cfg, _resume=resume
    )
    hook.after_load_checkpoint(runner, read_checkpoint(finished.work_dir / name))
    return hook


def test_training_does_not_begin_with_quantized_weights(finished: FinishedRun) -> None:
    with pytest.raises(ValueError, match='quantized already'):
        loading(finished, False, 'gplq_stage1.pth')


@pytest.mark.parametrize('name', ['../fp32.pth', 'gplq_stage1.pth', 'gplq_final.pth'])
def test_a_resume_needs_a_training_state(finished: FinishedRun, name: str) -> None:
    with pytest.raises(ValueError, match='no state of a GPLQ training to resume from'):
        loading(finished, True, name)


def test_a_resume_takes_over_the_source(finished: FinishedRun) -> None:
    source = recall_source(str(finished.work_dir))
    assert set(source) == {'path', 'sha256'}
    for name in ('gplq_calibrated.pth', 'epoch_1.pth'):
        assert loading(finished, True, name).source == source
