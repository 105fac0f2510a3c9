# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
from typing import Any

import pytest
from mmengine.config import Config

from gplq_mm.integrations.mm.launch.errors import ConfigError
from gplq_mm.integrations.mm.launch.library_ways import (
    set_mmpretrain_dataloaders,
    show_predictions,
    wrap_for_tta,
)


def config(scope: str, pack: str, **model: Any) -> Config:
    pipeline = [dict(type='LoadImageFromFile'), dict(type=pack)]
    return Config(
        dict(
            default_scope=scope,
            model=dict(type='gplq_mm.GPLQ', **model),
            test_dataloader=dict(num_workers=0, dataset=dict(type='X', pipeline=pipeline)),
            default_hooks=dict(visualization=dict(type='V')),
        )
    )


def test_mmpretrain_dataloaders_collate_as_its_own_tools_do() -> None:
    cfg = config('mmpretrain', 'PackInputs')
    cfg.val_dataloader = dict(num_workers=2, pin_memory=False, collate_fn=dict(type='mine'))
    set_mmpretrain_dataloaders(cfg)
    assert cfg.test_dataloader.collate_fn.type == 'default_collate'
    assert cfg.test_dataloader.persistent_workers is False
    assert cfg.val_dataloader == dict(
        num_workers=2, pin_memory=False, persistent_workers=True, collate_fn=dict(type='mine')
    )
    assert 'train_dataloader' not in cfg


@pytest.mark.parametrize(
    ('scope', 'pack', 'merger'),
    [
        ('mmdet', 'PackDetInputs', 'DetTTAModel'),
        ('mmpretrain', 'PackInputs', 'mmpretrain.AverageClsScoreTTA'),
        ('mmseg', 'PackSegInputs', 'mmseg.SegTTAModel'),
    ],
)
def test_tta_merges_an_image_and_its_mirror_image(scope: str, pack: str, merger: str) -> None:
    cfg = config(scope, pack, float_type='RetinaNet')
    wrap_for_tta(cfg)
    assert (cfg.model.type, cfg.model.module.type) == (merger, 'gplq_mm.GPLQ')
    load, branches = cfg.test_dataloader.dataset.pipeline
    assert load.type == 'LoadImageFromFile'
    flips, (last,) = branches.transforms
    assert [flip['prob'] for flip in flips] == [1.0, 0.0]
    assert last['type'] == pack
    assert ('flip' in last.get('meta_keys', ())) is (scope == 'mmdet')


def test_label_maps_are_not_mirrored() -> None:
    cfg = config('mmseg', 'PackSegInputs', float_type='EncoderDecoder')
    cfg.test_dataloader.dataset.pipeline.insert(1, dict(type='LoadAnnotations'))
    wrap_for_tta(cfg, draws=True)
    load, branches = cfg.test_dataloader.dataset.pipeline
    assert load.type == 'LoadImageFromFile'
    assert [step[0]['type'] for step in branches.transforms] == [
        'RandomFlip',
        'LoadAnnotations',
        'PackSegInputs',
    ]


def test_tta_of_the_config_wins() -> None:
    cfg = config('mmdet', 'PackDetInputs', roi_head=dict(mask_head=dict()))
    cfg.tta_model = dict(type='Mine')
    cfg.tta_pipeline = [dict(type='TestTimeAug')]
    wrap_for_tta(cfg)
    assert cfg.model.type == 'Mine'
    assert cfg.test_dataloader.dataset.pipeline == [dict(type='TestTimeAug')]


@pytest.mark.parametrize(
    'model',
    [
        dict(roi_head=dict(mask_head=dict())),
        dict(model=dict(roi_head=dict(mask_head=dict()))),
        dict(mask_head=dict()),
    ],
)
def test_tta_of_masks_is_refused(model: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match='merges boxes, not masks'):
        wrap_for_tta(config('mmdet', 'PackDetInputs', **model))


def test_tta_of_a_classifier_is_not_drawn() -> None:
    with pytest.raises(ConfigError, match='draws one version'):
        wrap_for_tta(config('mmpretrain', 'PackInputs'), draws=True)
    wrap_for_tta(config('mmdet', 'PackDetInputs', float_type='RetinaNet'), draws=True)


def test_tta_of_a_mask_head_taken_out() -> None:
    cfg = config('mmdet', 'PackDetInputs', roi_head=dict(mask_head=None, bbox_head=dict()))
    wrap_for_tta(cfg)
    assert cfg.model.type == 'DetTTAModel'


def test_show_predictions_in_the_words_of_each_library() -> None:
    detection, classification = config('mmdet', 'P'), config('mmpretrain', 'P')
    segmentation = config('mmseg', 'P')
    segmentation.visualizer = dict(type='V')
    for cfg in (detection, classification, segmentation):
        show_predictions(cfg, show=False, folder='painted', wait_time=1.0)
    assert detection.default_hooks.visualization == dict(
        type='V', draw=True, show=False, wait_time=1.0, test_out_dir='painted'
    )
    assert classification.default_hooks.visualization == dict(
        type='V', enable=True, show=False, wait_time=1.0, out_dir='painted'
    )
    assert segmentation.default_hooks.visualization == dict(
        type='V', draw=True, show=False, wait_time=1.0
    )
    assert segmentation.visualizer.save_dir == 'painted'


def test_show_predictions_needs_the_hook() -> None:
    with pytest.raises(ConfigError, match='visualization'):
        show_predictions(Config(dict(default_hooks=dict())), True, None, 1.0)
