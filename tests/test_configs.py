# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Every shipped detector config: parsed, checked and built."""

import math
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import PARAM_SCHEDULERS, init_default_scope
from mmengine.utils import get_installed_path

pytest.importorskip('mmdet')
pytest.importorskip('mmpretrain')

from gplq_mm.convert import resolve_recipe
from gplq_mm.integrations.mm.launch.config import override_data_root, override_image_size
from gplq_mm.registry import MODELS

ROOT = Path(__file__).resolve().parents[1]
DETECTORS = ('mask_rcnn', 'cascade_mask_rcnn', 'retinanet')
CONFIGS = sorted(
    path.stem for path in (ROOT / 'configs/gplq').glob('*.py') if path.stem.startswith(DETECTORS)
)
VARIANTS = ['w3a3', 'w8a8', 'w4a4_all', 'w4a4_paper']
SHRUNKEN_BACKBONE = {
    'SwinTransformer': {'model.backbone.depths': [1, 1, 1, 1]},
    'mmpretrain.ViTSAM': {
        'model.backbone.arch.num_layers': 2,
        'model.backbone.arch.global_attn_indexes': [1],
        'model.backbone.img_size': 64,
    },
}


@cache
def parse(name: str) -> Config:
    """Parsing costs a second: mmengine looks through mmdet's metafiles for each base."""
    return Config.fromfile(ROOT / 'configs/gplq' / f'{name}.py')


def load(name: str) -> Config:
    return deepcopy(parse(name))


def leaves(node: Any) -> Iterator[Any]:
    """All keys and all values that are no container."""
    if isinstance(node, dict):
        yield from node
        for value in node.values():
            yield from leaves(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from leaves(value)
    else:
        yield node


@cache
def zoo_files() -> str:
    """Text of all metafiles of the installed mmdet."""
    folder = Path(get_installed_path('mmdet')) / '.mim/configs'
    return '\n'.join(path.read_text(encoding='utf-8') for path in folder.rglob('metafile.yml'))


@pytest.mark.parametrize('name', CONFIGS)
def test_config_is_short_and_leaves_nothing_unmerged(name):
    cfg = load(name)
    assert len((ROOT / f'configs/gplq/{name}.py').read_text().splitlines()) <= 25
    assert '_delete_' not in set(leaves(cfg.to_dict()))


@pytest.mark.parametrize('name', CONFIGS)
def test_model_and_recipe_are_known(name):
    cfg = load(name)
    init_default_scope(cfg.default_scope)
    assert cfg.model.type == 'gplq_mm.GPLQ'
    assert MODELS.get(f'{cfg.default_scope}.{cfg.model.float_type}') is not None
    bits = [int(number) for number in name.split('_w')[-1][:3].split('a')]
    recipe = resolve_recipe(cfg.model.recipe)
    assert [recipe['weight']['num_bits'], recipe['activation']['num_bits']] == bits


@pytest.mark.parametrize('name', CONFIGS)
def test_stage_1_is_one_epoch_under_the_hook(name):
    cfg = load(name)
    assert cfg.custom_hooks == [dict(type='gplq_mm.GPLQHook')]
    assert cfg.train_cfg.max_epochs == cfg.train_cfg.val_interval == 1
    assert cfg.optim_wrapper == dict(constructor='gplq_mm.GPLQOptimWrapperConstructor')
    assert cfg.randomness == dict(seed=0)


@pytest.mark.parametrize('name', CONFIGS)
def test_checkpoint_is_in_the_zoo_or_made_by_a_tool(name):
    cfg = load(name)
    if cfg.load_from.startswith('http'):
        assert cfg.load_from in zoo_files()
    else:
        assert cfg.load_from.startswith('checkpoints/')
    assert cfg.model.backbone.init_cfg is None  # the detector's checkpoint holds the backbone


@pytest.mark.parametrize('name', CONFIGS)
def test_one_option_moves_the_data(name):
    cfg = load(name)
    override_data_root(cfg, '/mnt/coco')
    assert not [v for v in leaves(cfg.to_dict()) if isinstance(v, str) and 'data/coco' in v]
    assert cfg.train_dataloader.dataset.data_root == '/mnt/coco/'
    assert cfg.test_evaluator.ann_file == '/mnt/coco/annotations/instances_val2017.json'


def test_one_option_shrinks_the_images_of_vit():
    cfg = load('mask_rcnn_vit_w4a4')
    override_image_size(cfg, 256)
    loaders = (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader)
    numbers = {v for loader in loaders for v in leaves(loader.to_dict()) if isinstance(v, int)}
    assert 256 in numbers
    assert 1024 not in numbers


@pytest.mark.parametrize('model', ['mask_rcnn_vit', 'mask_rcnn_swin-t'])
@pytest.mark.parametrize('variant', VARIANTS)
def test_variant_changes_only_what_it_says(model, variant):
    base, cfg = (load(f'{model}_{name}').to_dict() for name in ('w4a4', variant))
    allowed = {'model'}
    if variant == 'w4a4_paper':
        assert cfg['train_dataloader']['batch_size'] == 1
        assert cfg['param_scheduler'] == []
        allowed |= {'train_dataloader', 'param_scheduler'}
    assert {key for key in base | cfg if base.get(key) != cfg.get(key)} == allowed
    assert {k for k in base['model'] if base['model'][k] != cfg['model'][k]} == {'recipe'}


@pytest.mark.parametrize('model', ['mask_rcnn_vit', 'mask_rcnn_swin-t'])
def test_paper_trains_as_the_paper_says(model):
    optim = resolve_recipe(load(f'{model}_w4a4_paper').model.recipe)['optim']
    assert (optim['lr'], optim['scale_lr'], optim['weight_decay']) == (5e-6, 5e-6, 0.0)


@pytest.mark.parametrize(('epochs', 'epoch_length'), [(1, 3), (1, 83), (2, 50)])
def test_learning_rate_falls_by_a_cosine_until_training_ends(epochs, epoch_length):
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    (scheduler,) = (
        PARAM_SCHEDULERS.build(
            {'end': epochs, **cfg},  # what the runner adds
            default_args=dict(optimizer=optimizer, epoch_length=epoch_length),
        )
        for cfg in load('mask_rcnn_swin-t_w4a4').param_scheduler
    )
    total = epochs * epoch_length
    for step in range(total):
        wanted = (1 + math.cos(math.pi * step / total)) / 2
        assert optimizer.param_groups[0]['lr'] == pytest.approx(wanted, abs=1e-6)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize('name', CONFIGS)
def test_model_builds(name):
    cfg = load(name)
    cfg.merge_from_dict(SHRUNKEN_BACKBONE[cfg.model.backbone.type])
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    assert cfg.model.float_type in {cls.__name__ for cls in type(model).__mro__}
    quantized = {name for name, _ in model.named_modules() if name.endswith('_quantizer')}
    scopes = {name.split('.')[0] for name in quantized}
    everything = {'backbone', 'neck', 'rpn_head', 'roi_head'}
    assert scopes == (everything if name.endswith('_all') else {'backbone'})
