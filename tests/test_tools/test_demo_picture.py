# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

mmcv = pytest.importorskip('mmcv', reason='needs mmcv')
pytest.importorskip('mmdet', reason='draws with mmdet')

import torch  # noqa: E402
from mmdet.registry import MODELS  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402

SCRIPT = Path(__file__).resolve().parents[2] / 'tools/demo_picture.py'
SPEC = importlib.util.spec_from_file_location('demo_picture', SCRIPT)
demo_picture = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(demo_picture)

CONFIG = """
_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py', 'mmdet::_base_/datasets/coco_instance.py',
          'mmdet::_base_/default_runtime.py']
model = dict(backbone=dict(depth=18, init_cfg=None), neck=dict(in_channels=[64, 128, 256, 512]),
             roi_head=dict(bbox_head=dict(num_classes=2), mask_head=dict(num_classes=2)),
             test_cfg=dict(rpn=dict(nms_pre=20, max_per_img=5), rcnn=dict(score_thr=0.0)))
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(32, 32)),
    dict(type='PackDetInputs', meta_keys=('img_path', 'ori_shape', 'img_shape', 'scale_factor'))]
metainfo = dict(classes=('a', 'b'), palette=[(255, 0, 0), (0, 0, 255)])
test_dataloader = dict(dataset=dict(pipeline=test_pipeline, metainfo=metainfo))
"""


def test_enlargement_is_undone_exactly_by_the_pipelines_resize():
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    large = demo_picture.enlarge(image)
    assert large.shape == (32 * demo_picture.SCALE, 48 * demo_picture.SCALE, 3)
    assert np.array_equal(mmcv.imresize(large, (48, 32), interpolation='bilinear'), image)


def test_grid_has_a_titled_column_a_model_and_a_row_an_image():
    drawings = {
        name: [np.full((20, 60, 3), 10 * column + row, np.uint8) for row in range(2)]
        for column, name in enumerate(('FP32', 'W32A4', 'W4A4'))
    }
    grid = demo_picture.side_by_side(drawings)
    bar, gap = demo_picture.BAR, demo_picture.GAP
    assert grid.shape == (bar + 2 * (20 + gap), 3 * (60 + gap), 3)
    for column, parts in enumerate(drawings.values()):
        left = column * (60 + gap)
        assert grid[:bar, left : left + 60].min() < 128  # something is written
        for row, part in enumerate(parts):
            top = bar + row * (20 + gap)
            assert np.array_equal(grid[top : top + 20, left : left + 60], part)


@pytest.fixture
def detector(tmp_path):
    """Return the config and checkpoint of a small detector with random weights."""
    init_default_scope('mmdet')
    config = tmp_path / 'config.py'
    config.write_text(CONFIG)
    torch.manual_seed(0)
    model = MODELS.build(Config.fromfile(config).model)
    meta = {'dataset_meta': {'classes': ('a', 'b')}}
    torch.save({'state_dict': model.state_dict(), 'meta': meta}, tmp_path / 'model.pth')
    return str(config), str(tmp_path / 'model.pth')


def test_picture_shows_what_each_model_predicts(detector, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    mmcv.imwrite(image, str(tmp_path / 'image.png'))
    out = tmp_path / 'new' / 'picture.png'
    models = ['--model', 'one', *detector, '--model', 'two', *detector]
    arguments = [str(tmp_path / 'image.png'), *models, '--out', str(out)]
    demo_picture.main([*arguments, '--score-thr', '0'])
    drawn = np.asarray(Image.open(out))
    demo_picture.main([*arguments, '--score-thr', '1.1'])
    bare = np.asarray(Image.open(out))
    width, bar, gap = 32 * demo_picture.SCALE, demo_picture.BAR, demo_picture.GAP
    first = (slice(bar, bar + width), slice(0, width))
    second = (slice(bar, bar + width), slice(width + gap, 2 * width + gap))
    assert np.array_equal(drawn[first], drawn[second])
    assert not np.array_equal(drawn[first], bare[first])
    assert np.array_equal(bare[first], demo_picture.enlarge(mmcv.bgr2rgb(image)))
