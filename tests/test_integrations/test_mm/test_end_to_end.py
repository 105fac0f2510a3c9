# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Shallow ViT, Swin and ViTDet: train -> stage 2 -> save -> test -> kill -> resume."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers.gplq_runs import (
    assert_same_weights,
    report,
    train,
    train_until,
    weights,
    write_gplq_config,
)
from tests.helpers.tiny_projects import TinyProject, make_project, our_tool, run_ok, train_float

pytest.importorskip('mmdet')
pytest.importorskip('mmpretrain')

NAMES = ('vit_classifier', 'mask_rcnn_swin', 'mask_rcnn_vit')


@pytest.fixture(scope='module', params=NAMES)
def run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TinyProject, Path, Path]:
    """A project, its GPLQ config of two epochs, and the work dir of a finished run."""
    project = make_project(tmp_path_factory.mktemp(request.param), request.param)
    config = write_gplq_config(project, train_float(project), epochs=2)
    return project, config, train(project, config, 'whole')


def test_report_has_every_stage_under_stock_metric_names(
    run: tuple[TinyProject, Path, Path],
) -> None:
    project, _, work_dir = run
    content = report(work_dir)
    name = 'coco/segm_mAP' if project.library == 'mmdet' else 'accuracy/top1'
    for stage in ('fp32', 'stage1', 'stage2'):
        assert name in content[stage]['metrics']
        for key in ('seconds', 'peak_memory_bytes', 'model_bytes', 'bops'):
            assert content[stage][key] > 0, (stage, key)
    assert content['fp32']['bops'] > content['stage1']['bops'] > content['stage2']['bops']
    assert content['fp32']['model_bytes'] > content['stage2']['model_bytes']
    assert content['coverage']['counts']['matmul'] > 0
    assert content['recipe']['name'] == 'w4a4 (customized)'
    assert content['versions']['gplq_mm']
    assert content['seed'] == 3


def codes_of(state: dict[str, torch.Tensor], layer: str) -> torch.Tensor:
    """Codes of a weight, ``(rows, elements)``: a multiple of its scale, input scale folded in."""
    weight, scale = state[f'{layer}.weight'], state[f'{layer}.input_quantizer.scale']
    if scale.dim():
        weight = weight * scale.view(1, -1, *[1] * (weight.dim() - 2))
    codes = weight.flatten(1) / state[f'{layer}.weight_quantizer.scale'][:, None]
    assert torch.allclose(codes, codes.round(), atol=1e-3)
    return codes.round()


def test_stage1_trains_scales_and_weights_and_stage2_puts_weights_on_a_grid(
    run: tuple[TinyProject, Path, Path],
) -> None:
    _, _, work_dir = run
    stage1, final = weights(work_dir / 'gplq_stage1.pth'), weights(work_dir / 'gplq_final.pth')
    layers = [k[: -len('.weight_quantizer.scale')] for k in final if 'weight_quantizer.scale' in k]
    assert layers
    for layer in layers:
        assert not bool(stage1[f'{layer}.weight_quantizer.calibrated'])
        assert bool(final[f'{layer}.weight_quantizer.calibrated'])
        low, high = final[f'{layer}.weight_quantizer.quant_range'].tolist()
        weight = final[f'{layer}.weight']
        for row in codes_of(final, layer)[:4]:
            assert len(row.unique()) <= high - low + 1
        assert not torch.equal(weight, stage1[f'{layer}.weight'])


def test_a_new_process_scores_the_moved_checkpoint_to_the_reported_figure(
    run: tuple[TinyProject, Path, Path], tmp_path: Path
) -> None:
    project, config, work_dir = run
    no_hook = ('--cfg-options', 'custom_hooks=[]')  # the tool brings it
    for stage, options in (('stage2', ()), ('stage1', no_hook)):
        file = 'gplq_final.pth' if stage == 'stage2' else 'gplq_stage1.pth'
        moved = tmp_path / f'elsewhere_{file}'
        shutil.copy(work_dir / file, moved)
        words = (config, moved, '--work-dir', tmp_path / stage, *options)
        output = run_ok(our_tool('test'), *words, cwd=project.root)
        assert 'quantizers active' in output
        scores = [json.loads(p.read_text()) for p in (tmp_path / stage).rglob('*.json')]
        scored = next(s for s in scores if any('/' in k for k in s))
        for name, value in report(work_dir)[stage]['metrics'].items():
            assert scored[name] == value, name


def test_killed_in_stage_1_and_resumed_is_the_uninterrupted_run(
    run: tuple[TinyProject, Path, Path],
) -> None:
    project, config, work_dir = run
    train_until(project, config, 'killed1', 'epoch_1.pth')
    assert not (project.root / 'killed1' / 'gplq_final.pth').exists()
    resumed = train(project, config, 'killed1', '--resume')
    assert_same_weights(resumed / 'gplq_final.pth', work_dir / 'gplq_final.pth')
    for stage in ('fp32', 'stage1', 'stage2'):
        assert report(resumed)[stage]['metrics'] == report(work_dir)[stage]['metrics']


def test_killed_in_stage_2_and_resumed_is_the_uninterrupted_run(
    run: tuple[TinyProject, Path, Path],
) -> None:
    project, config, work_dir = run
    if project.config.stem == 'mask_rcnn_vit':
        pytest.skip('shown on a classifier and a detector')
    train_until(project, config, 'killed2', 'gplq_stage1.pth')
    resumed = train(project, config, 'killed2', '--resume')
    assert_same_weights(resumed / 'gplq_final.pth', work_dir / 'gplq_final.pth')
    assert report(resumed)['stage2']['metrics'] == report(work_dir)['stage2']['metrics']


def test_killed_before_anything_was_saved_starts_again_from_fp32(
    run: tuple[TinyProject, Path, Path],
) -> None:
    project, config, work_dir = run
    if project.library == 'mmdet':
        pytest.skip('shown once, on the fastest model')
    train_until(project, config, 'killed0', 'gplq_source.json')
    resumed = train(project, config, 'killed0', '--resume')
    assert_same_weights(resumed / 'gplq_final.pth', work_dir / 'gplq_final.pth')


def test_killed_in_the_middle_of_an_epoch_and_resumed_is_the_uninterrupted_run(
    run: tuple[TinyProject, Path, Path],
) -> None:
    project, config, _ = run
    if project.library == 'mmdet':
        pytest.skip('shown once, on the fastest model')
    middle = config.with_name('gplq_middle.py')
    middle.write_text(
        f"_base_ = './{config.name}'\n"
        "loop = dict(type='gplq_mm.ResumableEpochLoop', max_epochs=1, val_interval=1)\n"
        'train_cfg = dict(_delete_=True, **loop)\n'
        'train_dataloader = dict(batch_size=2)\n'
        "checkpoint = dict(type='CheckpointHook', by_epoch=False, interval=1)\n"
        'default_hooks = dict(checkpoint=checkpoint)\n'
    )
    train_until(project, middle, 'killed_middle', 'iter_2.pth')
    resumed = train(project, middle, 'killed_middle', '--resume')
    logs = ''.join(p.read_text() for p in resumed.rglob('*.log'))
    assert 'continuing after batch' in logs
    whole = train(project, middle, 'whole_middle')
    assert_same_weights(resumed / 'gplq_final.pth', whole / 'gplq_final.pth')
