# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import ast
from pathlib import Path

import pytest
from mmengine.config import Config

from gplq_mm.integrations.mm.launch.config import (
    apply_cfg_options,
    override_data_root,
    override_image_size,
    read_file,
)
from tests.helpers.tiny_projects import REPOSITORY

TEXT = """
data_root = 'data/coco/'
image_size = (1024, 1024)
load_from = 'data/coco/float.pth'
work_dir = 'data/coco/work'
resize = dict(type='Resize', scale=image_size)
crops = [dict(type='RandomCrop', crop_size=[1024, 1024]), dict(type='Pad', size=(1024, 512))]
dataset = dict(type='CocoDataset', data_root=data_root, pipeline=[resize, *crops])
train_dataloader = dict(batch_size=2, dataset=dict(type='RepeatDataset', dataset=dataset))
val_evaluator = [dict(type='CocoMetric', ann_file=data_root + 'annotations/val.json')]
other = ('data/coco', 'data/coco_subset/a', 'my/data/coco/a')
"""


@pytest.fixture
def cfg(tmp_path) -> Config:
    path = tmp_path / 'config.py'
    path.write_text(TEXT)
    return Config.fromfile(path)


@pytest.mark.parametrize('root', ['/mnt/coco', '/mnt/coco/', Path('/mnt/coco')])
def test_data_root_reaches_every_copy(cfg, root):
    override_data_root(cfg, root)
    assert cfg.data_root == '/mnt/coco/'
    assert cfg.dataset.data_root == '/mnt/coco/'
    assert cfg.train_dataloader.dataset.dataset.data_root == '/mnt/coco/'
    assert cfg.val_evaluator[0].ann_file == '/mnt/coco/annotations/val.json'


def test_data_root_leaves_other_paths_alone(cfg):
    override_data_root(cfg, '/mnt/coco')
    assert cfg.other == ('/mnt/coco', 'data/coco_subset/a', 'my/data/coco/a')
    assert cfg.load_from == 'data/coco/float.pth'
    assert cfg.work_dir == 'data/coco/work'


@pytest.mark.parametrize('old', [None, '', '/'])
def test_config_without_data_root_is_refused(cfg, old):
    cfg.data_root = old
    with pytest.raises(ValueError, match=r'write\s+train_dataloader\.dataset\.data_root='):
        override_data_root(cfg, '/mnt/coco')


def test_image_size_reaches_every_copy(cfg):
    override_image_size(cfg, (256, 128))
    first, second, third = cfg.train_dataloader.dataset.dataset.pipeline
    assert cfg.image_size == first.scale == second.crop_size == (256, 128)
    assert third['size'] == (1024, 512)


@pytest.mark.parametrize('size', [0, (256,), (256, -1), (2.5, 2)])
def test_image_size_must_be_a_size(cfg, size):
    with pytest.raises(ValueError, match='one or two positive integers'):
        override_image_size(cfg, size)


def test_config_without_image_size_is_refused():
    with pytest.raises(ValueError, match='no `image_size` to replace by'):
        override_image_size(Config(dict(data_root='a')), 256)


def test_options_naming_one_place_win(cfg):
    apply_cfg_options(
        cfg,
        {
            'train_dataloader.dataset.dataset.data_root': '/one',
            'data_root': '/all',
            'image_size': 64,
            'train_dataloader.batch_size': 8,
        },
    )
    assert cfg.train_dataloader.dataset.dataset.data_root == '/one'
    assert cfg.val_evaluator[0].ann_file == '/all/annotations/val.json'
    assert cfg.resize.scale == (64, 64)
    assert cfg.train_dataloader.batch_size == 8


def test_changed_config_is_still_a_config(cfg, tmp_path):
    apply_cfg_options(cfg, {'data_root': '/mnt/coco', 'image_size': 64})
    cfg.dump(tmp_path / 'dumped.py')
    assert Config.fromfile(tmp_path / 'dumped.py').to_dict() == cfg.to_dict()


def test_keys_of_a_recipe_that_is_a_presets_name():
    cfg = Config(dict(model=dict(type='gplq_mm.GPLQ', recipe='w3a3')))
    apply_cfg_options(cfg, {'model.recipe.calibration.num_images': 8, 'model.recipe.mimic': None})
    assert cfg.model.recipe == dict(base='w3a3', calibration=dict(num_images=8), mimic=None)
    apply_cfg_options(cfg, {'model.recipe': 'w8a8'})
    assert cfg.model.recipe == 'w8a8'


BASE = "model = dict(type='gplq_mm.GPLQ', float_type='X', recipe='w3a3')\n"


def write_child(folder: Path, text: str, base: str = BASE) -> Path:
    (folder / 'base.py').write_text(base)
    (folder / 'child.py').write_text(f"_base_ = './base.py'\n{text}\n")
    return folder / 'child.py'


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ("model = dict(recipe=dict(scope='all'))", dict(base='w3a3', scope='all')),
        ("model = dict(recipe=dict(base='w2a4', scope='all'))", dict(base='w2a4', scope='all')),
        ("model = dict(recipe=dict(_delete_=True, scope='all'))", dict(scope='all')),
        ("model = dict(recipe='w2a4')", 'w2a4'),
    ],
)
def test_a_recipe_merges_over_a_presets_name(tmp_path: Path, text: str, expected: object) -> None:
    assert read_file(write_child(tmp_path, text)).model.recipe == expected


def test_options_merge_over_a_presets_name_beside_others(tmp_path: Path) -> None:
    cfg = read_file(write_child(tmp_path, 'x = 1'))
    apply_cfg_options(cfg, {'model.recipe.scope': 'all', 'model.recipe.mimic.type': 'feature'})
    assert cfg.model.recipe == dict(base='w3a3', scope='all', mimic=dict(type='feature'))


def test_a_recipe_of_another_project_is_merged_as_mmengine_does(tmp_path: Path) -> None:
    path = write_child(tmp_path, 'model = dict(recipe=dict(a=1))', "model = dict(recipe='cake')")
    with pytest.raises(TypeError, match='recipe is a dict in the child config'):
        read_file(path)


def test_stock_tools_merge_recipes_over_every_shipped_config(tmp_path: Path) -> None:
    shipped = sorted((REPOSITORY / 'configs' / 'gplq').glob('*_w*a*.py'))
    assert len(shipped) > 40
    for path in shipped:
        recipe = plain_recipe(path)
        assert not isinstance(recipe, str), f"{path}: write recipe=dict(base='{recipe}')"


def plain_recipe(path: Path) -> object:
    """What a file's own `model = dict(recipe=...)` gives; None where it gives none."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.keyword) and node.arg == 'recipe':
            return node.value.value if isinstance(node.value, ast.Constant) else node.value
    return None
