# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Every shipped classifier config: parsed, checked, built, and converted with nothing unknown."""

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from mmengine.utils import get_installed_path

pytest.importorskip('mmpretrain')

from gplq_mm.convert import quantized_layers, resolve_recipe
from gplq_mm.integrations.mm.launch.config import apply_cfg_options, override_image_size
from gplq_mm.integrations.mm.launch.errors import ConfigError
from gplq_mm.integrations.mm.launch.preflight import check_float_checkpoint
from gplq_mm.registry import MODELS

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / 'configs/gplq'
IMAGENET = sorted(path.stem for path in FOLDER.glob('*_in1k_*.py'))
SETS = {'cub': 200, 'cars': 196, 'flowers102': 102, 'pets': 37, 'aircraft': 100, 'food101': 101}
FINE_GRAINED = [f'swin-t_{name}_w4a4' for name in SETS] + ['swin-l_cub_w4a4']
PAPER = ['swin-t', 'swin-s', 'swin-b', 'swin-l', 'deit-s-distilled', 'deit-b-distilled']
NOT_OF_THE_ZOO = ['vit-s', 'deit3-s', 'deit3-b', 'dinov2-s', 'dinov2-b']
_BLOCK = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32)
_SWIN = dict(embed_dims=8, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8])
_SHRUNKEN: dict[str, dict[str, Any]] = {
    'SwinTransformer': _SWIN,
    'SwinTransformerV2': dict(**_SWIN, extra_norm_every_n_blocks=0),
}


@cache
def parse(name: str) -> Config:
    return Config.fromfile(FOLDER / f'{name}.py')


def load(name: str) -> Config:
    return deepcopy(parse(name))


def shrunken(cfg: Config) -> ConfigDict:
    """The model of a config with narrow layers, everything else as it is."""
    init_default_scope(cfg.default_scope)
    arch = _SHRUNKEN.get(cfg.model.backbone.type, _BLOCK)
    cfg.model.backbone.arch = ConfigDict(arch)
    cfg.model.head.in_channels = 64 if 'depths' in arch else 16
    return ConfigDict(**cfg.model, data_preprocessor=cfg.get('data_preprocessor'))


@cache
def zoo() -> dict[str, str]:
    """Config of each checkpoint that the installed mmpretrain's metafiles name."""
    folder = Path(get_installed_path('mmpretrain')) / '.mim/configs'
    models = [
        model
        for path in folder.rglob('metafile.yml')
        for model in yaml.safe_load(path.read_text(encoding='utf-8')).get('Models', [])
    ]
    return {m['Weights']: m['Config'] for m in models if m.get('Weights') and m.get('Config')}


def first_base(name: str) -> str:
    """The line of a config that names its float config, of the config itself or of its base."""
    lines = (FOLDER / f'{name}.py').read_text().splitlines()
    if any(line.startswith("_base_ = './") for line in lines):
        name = name.rpartition('_w')[0] + '_w4a4'
        lines = (FOLDER / f'{name}.py').read_text().splitlines()
    return next(line for line in lines if line.startswith("    'mmpretrain::")).strip(" ',")


def test_every_family_is_there():
    names = {name.split('_in1k_')[0] for name in IMAGENET if name.endswith('_w4a4')}
    wanted = {'swin-t', 'swin-s', 'swin-b', 'swin-l', 'swinv2-t', 'vit-s', 'vit-b', 'beit-b'}
    wanted |= {f'deit-{size}{kind}' for size in 'tsb' for kind in ('', '-distilled')}
    wanted |= {'deit3-s', 'deit3-b', 'dinov2-s', 'dinov2-b', 'beitv2-b', 'eva02-t', 'mae-vit-b'}
    assert wanted <= names
    assert {f'{name}_in1k_w4a4_paper' for name in PAPER} <= set(IMAGENET)


@pytest.mark.parametrize('name', IMAGENET + FINE_GRAINED)
def test_stage_1_replaces_the_schedule_of_the_base(name):
    cfg = load(name)
    assert cfg.custom_hooks == [dict(type='gplq_mm.GPLQHook')]  # no EMA hook of the base
    epochs = 1 if name in IMAGENET else 10
    assert cfg.train_cfg.type == 'gplq_mm.ResumableEpochLoop'
    assert set(cfg.train_cfg) == {'type', 'max_epochs', 'val_interval'}
    assert cfg.train_cfg.max_epochs == epochs
    assert cfg.optim_wrapper == dict(constructor='gplq_mm.GPLQOptimWrapperConstructor')
    assert cfg.randomness == dict(seed=0)
    assert cfg.default_hooks.checkpoint.by_epoch is False
    assert cfg.model.train_cfg is None  # no Mixup, no CutMix
    if name in IMAGENET:
        assert cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size == 128
        assert cfg.data_root == cfg.train_dataloader.dataset.data_root.rstrip('/')
    assert cfg.param_scheduler == ([] if name.endswith('_paper') else cfg.stage1_scheduler)


@pytest.mark.parametrize('name', IMAGENET + FINE_GRAINED)
def test_bits_are_those_of_the_name(name):
    bits = [int(number) for number in name.rsplit('_w')[-1][:3].split('a')]
    recipe = resolve_recipe(load(name).model.recipe)
    assert [recipe['weight']['num_bits'], recipe['activation']['num_bits']] == bits


@pytest.mark.parametrize('name', IMAGENET + FINE_GRAINED)
def test_checkpoint_is_the_zoos_for_this_config(name):
    cfg = load(name)
    if name.split('_in1k')[0] in NOT_OF_THE_ZOO:
        assert cfg.load_from.startswith('checkpoints/')
    elif name in FINE_GRAINED and name != 'swin-l_cub_w4a4':
        assert cfg.load_from is None
        with pytest.raises(ConfigError, match='load_from is empty; give the FP32 checkpoint'):
            check_float_checkpoint(cfg.load_from)
    else:
        base = first_base(name).removeprefix('mmpretrain::')
        assert zoo()[cfg.load_from] == f'configs/{base}'


@pytest.mark.parametrize('name', IMAGENET + FINE_GRAINED)
def test_model_builds_and_nothing_in_it_is_unknown(name):
    model = MODELS.build({**shrunken(load(name)), 'strict': True})
    assert 'ImageClassifier' in {cls.__name__ for cls in type(model).__mro__}
    assert model.data_preprocessor.batch_augments is None
    kept = {name.rpartition('.')[2] for name, _ in model.gplq.coverage.kept_float}
    assert kept == ({'cpb_mlp'} if name.startswith('swinv2') else set())
    head = {n: m for n, m in quantized_layers(model).items() if n.startswith('head.')}
    assert len(head) == (2 if 'distilled' in name else 1)
    for layer in (*head.values(), first_layer(model)):
        assert layer.input_quantizer.spec.num_bits == layer.weight_quantizer.spec.num_bits == 8


def first_layer(model: torch.nn.Module) -> Any:
    return next(iter(quantized_layers(model).values()))


@pytest.mark.parametrize('recipe', ['w3a3', 'w8a8', 'w2a4'])
@pytest.mark.parametrize('name', ['vit-b', 'beit-b', 'swinv2-t'])
def test_one_option_gives_other_bits(name, recipe):
    cfg = load(f'{name}_in1k_w4a4')
    apply_cfg_options(cfg, {'model.recipe': recipe})
    model = MODELS.build(shrunken(cfg))
    assert model.gplq.recipe.name == recipe
    block = 'stages.0.blocks.0' if name == 'swinv2-t' else 'layers.0'
    layer = model.get_submodule(f'backbone.{block}.ffn.layers.1')
    assert layer.weight_quantizer.spec.num_bits == int(recipe[1])
    assert layer.input_quantizer.spec.num_bits == int(recipe[3])


@pytest.mark.parametrize('model', PAPER)
def test_paper_trains_as_the_paper_says(model):
    base, cfg = (load(f'{model}_in1k_{name}').to_dict() for name in ('w4a4', 'w4a4_paper'))
    assert {key for key in base | cfg if base.get(key) != cfg.get(key)} == {
        'model',
        'param_scheduler',
    }
    recipe = resolve_recipe(cfg['model']['recipe'])
    assert recipe['mimic']['type'] == 'paper'
    optim = recipe['optim']
    assert (optim['lr'], optim['scale_lr'], optim['weight_decay']) == (5e-6, 5e-6, 0.0)


@pytest.mark.parametrize('data', [*SETS, 'flowers17'])
def test_transfer_follows_the_papers_protocol(data):
    cfg = load(f'{data}_transfer')
    assert cfg.train_cfg.max_epochs == 100
    assert cfg.optim_wrapper.optimizer == dict(type='AdamW', lr=1e-3)
    assert cfg.train_dataloader.batch_size == 64
    assert cfg.model == dict(
        type='gplq_mm.LinearProbe', num_classes=cfg.num_classes, drop_path_rate=0.1
    )
    assert cfg.num_classes == {**SETS, 'flowers17': 17}[data]


@pytest.mark.parametrize('data', [*SETS, 'flowers17'])
def test_data_sets_exist_in_the_library(data):
    from mmpretrain.registry import DATASETS

    cfg = load(f'{data}_transfer')
    kind = DATASETS.get(cfg.train_dataloader.dataset.type)
    classes = kind.METAINFO.get('classes') if kind.METAINFO else None
    assert classes is None or len(classes) == cfg.num_classes
    assert cfg.train_dataloader.dataset != cfg.val_dataloader.dataset == cfg.test_dataloader.dataset
    override_image_size(cfg, 32)
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        assert loader.dataset.pipeline[1].scale == (32, 32)
