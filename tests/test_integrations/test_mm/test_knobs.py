# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Knobs of stage 1 in whole runs: averages, mixed precision, frozen weights, stored PCA bases."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.runner import Runner

from gplq_mm.convert import quantizers
from gplq_mm.integrations.mm.cpu_amp import CpuAmpOptimWrapper
from tests.helpers.gplq_runs import assert_same_weights, weights
from tests.helpers.runners import RECIPE, gplq_config, make_runner
from tests.helpers.tiny_projects import TinyProject


def run(
    project: TinyProject, start: Path, work_dir: Path, recipe: Mapping[str, Any], **options: Any
) -> Runner:
    runner = make_runner(gplq_config(project, start, work_dir, {**RECIPE, **recipe}, **options))
    runner.train()
    return runner


TWO_EPOCHS = {
    'train_cfg': dict(by_epoch=True, max_epochs=2, val_interval=2),
    'default_hooks.checkpoint': dict(type='CheckpointHook', interval=1),
}
AVERAGES = {
    'buffers': dict(type='EMAHook', momentum=0.25, update_buffers=True),
    'swa': dict(type='EMAHook', ema_type='StochasticWeightAverage', begin_iter=4),
    'momentum': dict(type='EMAHook', ema_type='MomentumAnnealingEMA', gamma=5),
}


@pytest.mark.parametrize('name', AVERAGES)
def test_averaged_quantizers_are_whole_and_resume_exactly(
    project: TinyProject, fp32: Path, tmp_path: Path, name: str
) -> None:
    hooks = (AVERAGES[name],)
    runner = run(project, fp32, tmp_path / 'a', {}, hooks=hooks, **TWO_EPOCHS)
    stage1, start = (weights(tmp_path / 'a' / f'gplq_{x}.pth') for x in ('stage1', 'calibrated'))
    ema = torch.load(tmp_path / 'a/epoch_1.pth', weights_only=True)['ema_state_dict']
    for quantizer in quantizers(runner.model, 'activation'):
        assert bool(stage1[f'{quantizer}.calibrated'])
        assert bool(ema[f'module.{quantizer}.calibrated'])
        assert (stage1[f'{quantizer}.scale'] > 0).all()
        assert torch.equal(stage1[f'{quantizer}.zero_point'], ema[f'module.{quantizer}.zero_point'])
        zero_point = stage1[f'{quantizer}.zero_point']
        assert torch.equal(zero_point, zero_point.round())
    assert set(stage1) == set(start)
    moved = [
        k for k in stage1 if k.endswith('scale') and not torch.equal(stage1[k], ema[f'module.{k}'])
    ]
    assert moved
    again = dict(hooks=hooks, resume=True, **TWO_EPOCHS)
    run(project, tmp_path / 'a/epoch_1.pth', tmp_path / 'b', {}, **again)
    for file in ('gplq_stage1.pth', 'gplq_final.pth'):
        assert_same_weights(tmp_path / 'a' / file, tmp_path / 'b' / file)


def test_a_pca_basis_is_stored_for_a_resume_and_not_in_the_final_file(
    project: TinyProject, fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {'mimic': [dict(type='pca', num_images=36), dict(type='logits', task_weight=0.5)]}
    run(project, fp32, tmp_path / 'a', recipe, **TWO_EPOCHS)
    load = lambda path: torch.load(path, weights_only=True)  # noqa: E731
    for name in ('epoch_1.pth', 'gplq_calibrated.pth'):
        ((settings, basis),) = load(tmp_path / 'a' / name)['gplq']['mimic']['bases']
        assert (settings['num_images'], basis.shape) == (36, (32, 32))
    for name in ('gplq_stage1.pth', 'gplq_final.pth'):
        assert 'mimic' not in load(tmp_path / 'a' / name)['gplq']
    monkeypatch.setattr('gplq_mm.distillation.mimic_terms.PCATerm.fit', None)  # must not be called
    run(project, tmp_path / 'a/epoch_1.pth', tmp_path / 'b', recipe, resume=True, **TWO_EPOCHS)
    assert_same_weights(tmp_path / 'a/gplq_final.pth', tmp_path / 'b/gplq_final.pth')


def test_mixed_precision_trains_float32_weights_and_scales_on_the_cpu(
    project: TinyProject, fp32: Path, tmp_path: Path
) -> None:
    cfg = gplq_config(project, fp32, tmp_path, RECIPE)
    cfg.optim_wrapper.update(type='AmpOptimWrapper', dtype='bfloat16', loss_scale='dynamic')
    runner = make_runner(cfg)
    seen: list[torch.dtype] = []
    layer = runner.model.backbone.layers[0].ffn.layers[1]

    def look(module: Any, args: Any, output: torch.Tensor) -> None:
        if module.training:
            seen.append(output.dtype)

    layer.register_forward_hook(look)
    runner.train()
    assert type(runner.optim_wrapper) is CpuAmpOptimWrapper
    assert set(seen) == {torch.bfloat16}
    stage1 = weights(tmp_path / 'gplq_stage1.pth')
    start = weights(tmp_path / 'gplq_calibrated.pth')
    floating = [k for k, v in stage1.items() if v.is_floating_point()]
    assert {stage1[k].dtype for k in floating} == {torch.float32}
    assert all(stage1[k].isfinite().all() for k in floating)
    moved = [k for k in floating if not torch.equal(stage1[k], start[k])]
    assert sum(k.endswith('scale') for k in moved) > 10
    assert len(moved) > 30


def test_half_precision_on_the_cpu_is_refused(
    project: TinyProject, fp32: Path, tmp_path: Path
) -> None:
    cfg = gplq_config(project, fp32, tmp_path, RECIPE)
    cfg.optim_wrapper.update(type='AmpOptimWrapper', dtype='float16')
    with pytest.raises(ValueError, match=r"dtype='float16'.*dtype='bfloat16'"):
        make_runner(cfg).train()


@pytest.mark.parametrize('train', ['projection', 'none'])
def test_frozen_weights_are_those_of_the_float_model(
    project: TinyProject, fp32: Path, tmp_path: Path, train: str
) -> None:
    run(project, fp32, tmp_path, {'optim': dict(train=train)})
    stage1, start = weights(tmp_path / 'gplq_stage1.pth'), weights(fp32)
    moved = {k for k in start if not torch.equal(start[k], stage1[k])}
    projections = {k for k in start if '.attn.proj.' in k}
    assert moved == (projections if train == 'projection' else set())
    assert any(k.endswith('_quantizer.scale') for k in stage1)


def test_with_nothing_to_train_one_error_says_so(
    project: TinyProject, fp32: Path, tmp_path: Path
) -> None:
    recipe = {'optim': dict(train='none'), 'activation': dict(learn_scale=False)}
    with pytest.raises(ValueError, match=r"nothing to train: recipe\.optim\.train='none'"):
        run(project, fp32, tmp_path, recipe)


def test_a_recipe_from_before_the_knob_still_fits(
    project: TinyProject, fp32: Path, tmp_path: Path
) -> None:
    runner = run(project, fp32, tmp_path, {}, **{'train_cfg.max_epochs': 0})
    old = torch.load(tmp_path / 'gplq_final.pth', weights_only=True)
    del old['gplq']['recipe']['optim']['train']
    torch.save(old, tmp_path / 'old.pth')
    full = runner.model.gplq.recipe.as_dict()
    without = {**full, 'optim': {k: v for k, v in full['optim'].items() if k != 'train'}}
    metrics = [
        make_runner(gplq_config(project, tmp_path / name, tmp_path / 'test', recipe)).test()
        for name, recipe in [('gplq_final.pth', RECIPE), ('old.pth', RECIPE), ('old.pth', without)]
    ]
    assert metrics[0] == metrics[1] == metrics[2]


TOO_MANY = [
    (dict(mimic=dict(type='pca', num_images=41)), r'mimic asks for 41 images.*has 40.*num_images'),
    (dict(mimic=dict(type='pca', num_images=20)), r'PCA of 20 samples cannot give 32 components'),
    (dict(calibration=dict(num_images=41)), r'calibration asks for 41 images.*has 40'),
]


@pytest.mark.parametrize(('recipe', 'message'), TOO_MANY, ids=['pca', 'components', 'calibration'])
def test_too_few_images_are_one_error_before_the_float_model_is_scored(
    project: TinyProject, fp32: Path, tmp_path: Path, recipe: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(project, fp32, tmp_path, recipe)
    assert not (tmp_path / 'gplq_calibrated.pth').exists()


def test_a_classifier_that_lacks_its_neck_is_refused(project: TinyProject, tmp_path: Path) -> None:
    from mmengine.registry import MODELS, DefaultScope

    swin = dict(
        type='SwinTransformer',
        arch=dict(embed_dims=8, depths=[1, 1], num_heads=[1, 2]),
        img_size=32,
        patch_size=4,
        window_size=4,
        out_indices=(1,),
    )
    model = dict(
        type='ImageClassifier',
        backbone=swin,
        head=dict(type='LinearClsHead', num_classes=2, in_channels=16),
    )
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        torch.save({'state_dict': MODELS.build(dict(model)).state_dict()}, tmp_path / 'fp32.pth')
    cfg = gplq_config(project, tmp_path / 'fp32.pth', tmp_path / 'run')
    cfg.model = dict(type='gplq_mm.GPLQ', model=model, recipe=RECIPE)
    with pytest.raises(ValueError, match=r"does not run.*no neck.*type='GlobalAveragePooling'"):
        make_runner(cfg).train()
