# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""What runs on a GPU: both engines, mixed precision, every algorithm of stage 2, whole runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

if not torch.cuda.is_available():
    pytest.skip('needs a GPU', allow_module_level=True)
pytest.importorskip('mmpretrain')
pytest.importorskip('mmdet')

from mmpretrain.models.backbones.vision_transformer import TransformerEncoderLayer

from gplq_mm.integrations.mm.studies.ptq_comparison import PTQComparison
from gplq_mm.ops import set_engine
from tests.helpers.attentions import ATTENTIONS, randomized
from tests.helpers.engines import assert_engines_agree, converted
from tests.helpers.gplq_runs import assert_same_weights, report, train, weights, write_gplq_config
from tests.helpers.mm_models import CLASSIFIERS, DETECTORS, classifier, run_detector
from tests.helpers.runners import RECIPE, gplq_config, make_runner
from tests.helpers.saved import saved_bytes
from tests.helpers.tiny_projects import TinyProject, make_project, our_tool, run_ok, train_float
from tests.test_integrations.test_mm.conftest import FinishedRun

PTQS = (
    'minmax',
    'percentile',
    'mse',
    'percentile+qwt',
    'mse+qwt_v2',
    'gptq',
    'gptq(asymmetric=True)',
    'repq+gptq+bias_correction',
    'adaround(steps=20)',
    'brecq(steps=20)',
    'brecq(steps=5,global_weight=0.5)',
    'gptq+global(steps=20)',
)


@pytest.fixture(autouse=True)
def exact_convolutions() -> None:
    """Convolutions in float32, not in TF32."""
    torch.backends.cudnn.allow_tf32 = False


def on_gpu(value: Any) -> Any:
    """A module's arguments with their tensors on the GPU."""
    if isinstance(value, tuple):
        return tuple(on_gpu(v) for v in value)
    return value.cuda() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize('recipe', ['w4a4', 'gplq_w4a4_paper'])
@pytest.mark.parametrize('case', ATTENTIONS)
def test_engines_agree_on_attention(case: str, recipe: str) -> None:
    make, shape, extra = ATTENTIONS[case]
    extra, x = on_gpu(extra), torch.randn(shape).cuda()
    run = lambda m, x: m(x, *extra)  # noqa: E731
    assert_engines_agree(converted(randomized(make()).cuda(), x, run, recipe), x, run)


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_engines_agree_on_classifiers(name: str) -> None:
    size = CLASSIFIERS[name][1]
    x = torch.randn(2, 3, size, size).cuda()
    run = lambda m, x: m(x, mode='tensor')  # noqa: E731
    assert_engines_agree(converted(classifier(name).cuda(), x, run), x, run)


@pytest.mark.parametrize('name', DETECTORS)
def test_engines_agree_on_detectors(name: str) -> None:
    x = torch.randn(2, 3, 64, 64).cuda()
    assert_engines_agree(converted(DETECTORS[name]().cuda(), x, run_detector), x, run_detector)


def test_fused_blocks_save_and_hold_less_than_float_ones() -> None:
    peaks, saved = {}, {}
    run = lambda m, x: m(x)  # noqa: E731
    for engine in ('float', 'reference', 'fused'):
        model = nn.Sequential(*(TransformerEncoderLayer(192, 3, 768) for _ in range(4))).cuda()
        x = torch.randn(32, 196, 192).cuda()
        if engine != 'float':
            converted(model, x, run)
            set_engine(model, engine)
        model.train()
        saved[engine] = saved_bytes(model, lambda m=model, x=x: m(x))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(x).sum().backward()
        torch.cuda.synchronize()
        peaks[engine] = torch.cuda.max_memory_allocated() - before
        del model, x
    assert saved['fused'] < 0.6 * saved['float'] < saved['reference']
    assert peaks['fused'] < peaks['float'] < peaks['reference']


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_a_whole_run_trains_float32_weights_and_scales(
    project: TinyProject, fp32: Path, tmp_path: Path, dtype: str
) -> None:
    cfg = gplq_config(project, fp32, tmp_path, RECIPE)
    if dtype != 'float32':
        cfg.optim_wrapper.update(type='AmpOptimWrapper', dtype=dtype, loss_scale='dynamic')
    runner = make_runner(cfg)
    seen: set[torch.dtype] = set()

    def look(module: Any, args: Any, output: torch.Tensor) -> None:
        if module.training:
            assert output.is_cuda
            seen.add(output.dtype)

    runner.model.backbone.layers[0].ffn.layers[1].register_forward_hook(look)
    runner.train()
    assert seen == {getattr(torch, dtype)}
    start, stage1 = (weights(tmp_path / f'gplq_{n}.pth') for n in ('calibrated', 'stage1'))
    floating = [k for k, v in stage1.items() if v.is_floating_point()]
    assert {stage1[k].dtype for k in floating} == {torch.float32}
    assert all(stage1[k].isfinite().all() for k in floating)
    moved = [k for k in floating if not torch.equal(stage1[k], start[k])]
    assert sum(k.endswith('scale') for k in moved) > 10
    told = report(tmp_path)
    assert told['stage1']['peak_memory_bytes'] > 0
    assert told['stage2']['metrics']


def test_the_same_run_twice_and_resumed_gives_the_same_weights(
    project: TinyProject, fp32: Path, tmp_path: Path
) -> None:
    two = {
        'train_cfg': dict(by_epoch=True, max_epochs=2, val_interval=2),
        'default_hooks.checkpoint': dict(type='CheckpointHook', interval=1),
        'randomness': dict(seed=3, deterministic=True),
    }
    for name, start, more in (
        ('a', fp32, {}),
        ('b', fp32, {}),
        ('c', tmp_path / 'a/epoch_1.pth', {'resume': True}),
    ):
        make_runner(gplq_config(project, start, tmp_path / name, **two, **more)).train()
    for other in 'bc':
        assert_same_weights(tmp_path / 'a/gplq_final.pth', tmp_path / other / 'gplq_final.pth')


@pytest.mark.parametrize('ptq', PTQS)
def test_stage2(finished: FinishedRun, tmp_path: Path, ptq: str) -> None:
    stage1 = finished.work_dir / 'gplq_stage1.pth'
    runner = make_runner(gplq_config(finished.project, stage1, tmp_path))
    runner.call_hook('before_run')
    runner.load_checkpoint(str(stage1))
    comparison = PTQComparison(runner, str(stage1), 'tiny')
    comparison.run(ptq, str(tmp_path / 'final.pth'), 3)
    (row,) = comparison.rows
    assert row['sqnr_db'] > 0
    assert all(v.isfinite().all() for v in weights(tmp_path / 'final.pth').values())


@pytest.mark.parametrize('metric', ['sqnr', 'kl', 'loss'])
def test_sensitivity(project: TinyProject, fp32: Path, metric: str) -> None:
    config = write_gplq_config(project, fp32, 'sensitivity')
    out = project.root / f'sensitivity_{metric}'
    words = ('--calibrate', '--metric', metric, '--bits', 3, 4, '--mean-weight-bits', 3.5)
    run_ok(
        our_tool('sensitivity'),
        config,
        fp32,
        *('--work-dir', out, '--num-images', 4, *words),
        cwd=project.root,
        gpu=True,
    )
    assert (out / 'sensitivity.json').is_file()


@pytest.mark.parametrize('name', ['mask_rcnn_swin', 'mask_rcnn_vit'])
def test_a_detector(tmp_path: Path, name: str) -> None:
    project = make_project(tmp_path, name)
    checkpoint = train_float(project)
    recipe = "dict(base='w4a4', scope='all', calibration=dict(num_images=4))"
    config = write_gplq_config(project, checkpoint, recipe=recipe)
    # some builds of RoIAlign have no deterministic gradient, and say so
    options = ('--cfg-options', 'randomness.deterministic=False')
    done = train(project, config, 'gplq', *options, gpu=True)
    told = report(done)
    assert {'coco/bbox_mAP', 'coco/segm_mAP'} <= set(told['stage2']['metrics'])
    final = done / 'gplq_final.pth'
    assert all(v.isfinite().all() for v in weights(final).values())
    run_ok(our_tool('test'), config, final, *options, cwd=project.root, gpu=True)
