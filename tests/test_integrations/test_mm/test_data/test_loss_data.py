# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
from typing import Any

from mmengine.config import Config

from gplq_mm.integrations.mm.data.loss_data import with_labels

LOAD, RESIZE, PACK = dict(type='LoadImageFromFile'), dict(type='Resize'), dict(type='PackInputs')
LABELS = dict(type='LoadAnnotations', with_bbox=True)


def config(test: list[dict[str, Any]], train: list[dict[str, Any]]) -> Config:
    loaders = {
        f'{split}_dataloader': dict(dataset=dict(type='Data', pipeline=pipeline))
        for split, pipeline in (('train', train), ('val', test), ('test', test))
    }
    return Config(loaders)


def types(cfg: Config, split: str) -> list[str]:
    dataset = cfg[f'{split}_dataloader'].dataset
    return [t.type for t in (dataset.get('dataset') or dataset).pipeline]


def test_annotations_are_loaded_before_the_resize() -> None:
    cfg = config([LOAD, RESIZE, LABELS, PACK], [LOAD, LABELS, RESIZE, PACK])
    own = with_labels(cfg)
    for split in ('val', 'test'):
        assert types(own, split) == ['LoadImageFromFile', 'LoadAnnotations', 'Resize', 'PackInputs']
    assert own.val_dataloader.dataset.pipeline[1].with_bbox
    assert types(cfg, 'val')[1] == 'Resize'  # the run's config does not change


def test_a_wrapped_data_set_gets_them_too() -> None:
    cfg = config([LOAD, RESIZE, PACK], [LOAD, LABELS, RESIZE, PACK])
    cfg.val_dataloader.dataset = dict(type='RepeatDataset', dataset=cfg.val_dataloader.dataset)
    assert types(with_labels(cfg), 'val')[1] == 'LoadAnnotations'


def test_a_classifiers_pipelines_stay() -> None:
    cfg = config([LOAD, RESIZE, PACK], [LOAD, RESIZE, PACK])
    assert with_labels(cfg).to_dict() == cfg.to_dict()
