# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Every shipped segmentor config: parsed, checked and built."""

from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.utils import get_installed_path

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

from gplq_mm.convert import resolve_recipe
from gplq_mm.integrations.mm.launch.config import override_data_root
from gplq_mm.registry import MODELS
from tests.test_configs import leaves

ROOT = Path(__file__).resolve().parents[1]
SEGMENTORS = ('upernet', 'segmenter', 'segformer', 'mask2former')
CONFIGS = sorted(
    path.stem for path in (ROOT / 'configs/gplq').glob('*.py') if path.stem.startswith(SEGMENTORS)
)
BUILT = {
    'upernet_swin-t_ade20k_w4a4': {'backbone.depths': [1, 1, 1, 1], 'decode_head.channels': 16},
    'upernet_swin-t_ade20k_w4a4_all': {
        'backbone.depths': [1, 1, 1, 1],
        'decode_head.channels': 16,
    },
    'segmenter_vit-s_ade20k_w4a4': {'backbone.num_layers': 1},
    'segformer_mit-b0_cityscapes_w4a4': {'backbone.num_layers': [1, 1, 1, 1]},
    'mask2former_swin-t_ade20k_w4a4': {'backbone.depths': [1, 1, 1, 1]},
}
"""One config of each family, made smaller; the others differ in sizes and data."""


@cache
def parse(name: str) -> Config:
    """Parsing looks through mmseg's metafiles for each base."""
    return Config.fromfile(ROOT / 'configs/gplq' / f'{name}.py')


@cache
def zoo_files() -> str:
    """Text of all metafiles of the installed mmseg."""
    folder = Path(get_installed_path('mmseg')) / '.mim/configs'
    return '\n'.join(path.read_text(encoding='utf-8') for path in folder.rglob('metafile.yaml'))


def test_all_families_are_there() -> None:
    assert {name.split('_')[0] for name in CONFIGS} == set(SEGMENTORS)
    assert {name.split('_')[2] for name in CONFIGS} == {'ade20k', 'cityscapes'}


@pytest.mark.parametrize('name', CONFIGS)
def test_config_is_short_and_trains_one_epoch_under_the_hook(name: str) -> None:
    cfg = parse(name)
    assert len((ROOT / f'configs/gplq/{name}.py').read_text().splitlines()) <= 25
    assert '_delete_' not in set(leaves(cfg.to_dict()))
    assert cfg.custom_hooks == [dict(type='gplq_mm.GPLQHook')]
    assert cfg.train_cfg == dict(type='gplq_mm.ResumableEpochLoop', max_epochs=1, val_interval=1)
    assert cfg.train_dataloader.sampler.type == 'DefaultSampler'
    assert cfg.log_processor.by_epoch and cfg.default_hooks.logger.log_metric_by_epoch
    assert cfg.optim_wrapper == dict(constructor='gplq_mm.GPLQOptimWrapperConstructor')


@pytest.mark.parametrize('name', CONFIGS)
def test_checkpoint_is_in_the_zoo_or_made_by_a_tool(name: str) -> None:
    cfg = parse(name)
    if cfg.load_from.startswith('http'):
        assert cfg.load_from in zoo_files()
    else:
        assert cfg.load_from.startswith('checkpoints/')
    assert cfg.model.backbone.init_cfg is None  # the segmentor's checkpoint holds the backbone
    assert cfg.model.get('pretrained') is None


@pytest.mark.parametrize('name', CONFIGS)
def test_one_option_moves_the_data(name: str) -> None:
    cfg = deepcopy(parse(name))
    override_data_root(cfg, '/mnt/data')
    assert cfg.train_dataloader.dataset.data_root.rstrip('/') == '/mnt/data'
    strings = [v for v in leaves(cfg.to_dict()) if isinstance(v, str)]
    assert not [v for v in strings if v.startswith('data/')]


@pytest.mark.parametrize('name', CONFIGS)
def test_recipe_has_the_bits_of_its_name(name: str) -> None:
    recipe = resolve_recipe(parse(name).model.recipe)
    bits = [int(number) for number in name.split('_w')[-1][:3].split('a')]
    assert [recipe['weight']['num_bits'], recipe['activation']['num_bits']] == bits


@pytest.mark.parametrize('name', BUILT)
def test_model_builds(name: str) -> None:
    cfg = deepcopy(parse(name))
    small = Config(dict(model=cfg.model))
    small.merge_from_dict({f'model.{key}': value for key, value in BUILT[name].items()})
    init_default_scope(cfg.default_scope)
    model = MODELS.build(small.model)
    assert cfg.model.float_type in {cls.__name__ for cls in type(model).__mro__}
    quantized = {name for name, _ in model.named_modules() if name.endswith('_quantizer')}
    wanted = {'backbone', 'decode_head'} if name.endswith('_all') else {'backbone'}
    assert {name.split('.')[0] for name in quantized} == wanted
