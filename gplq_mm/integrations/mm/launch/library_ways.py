# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Differences between the tools of mmdet, mmpretrain and mmseg, chosen by the default scope."""

from copy import deepcopy
from typing import Any

import torch
from mmengine.config import Config, ConfigDict

from .errors import ConfigError


def set_mmpretrain_dataloaders(cfg: Config) -> None:
    """Give the dataloaders the defaults that mmpretrain's own tools give them."""
    for split in ('train', 'val', 'test'):
        dataloader = cfg.get(f'{split}_dataloader')
        if dataloader:
            dataloader.setdefault('pin_memory', torch.cuda.is_available())
            dataloader.setdefault('persistent_workers', dataloader.get('num_workers', 0) > 0)
            dataloader.setdefault('collate_fn', ConfigDict(type='default_collate'))


def wrap_for_tta(cfg: Config, draws: bool = False) -> None:
    """Put the model into a test-time-augmentation model, as the libraries' own tools do.

    Args:
        cfg: Config to change.
        draws: Whether predictions are drawn as well.

    Raises:
        ConfigError: If the model predicts masks, which mmdet's TTA model cannot merge, or if
            mmpretrain's hook would draw several versions of an image.
    """
    if draws and cfg.get('default_scope') not in ('mmdet', 'mmseg'):
        raise ConfigError(
            "--tta with --show or --show-dir: mmpretrain's visualization hook draws one version "
            'of an image; run once with --tta and once with --show-dir'
        )
    cfg.setdefault('tta_model', _flip_model(cfg))
    dataset = cfg.test_dataloader.dataset
    cfg.setdefault('tta_pipeline', _flip_pipeline(cfg, dataset.pipeline))
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    dataset.pipeline = cfg.tta_pipeline


def _flip_model(cfg: Config) -> ConfigDict:
    """The library's model that merges the predictions of an image and its mirror image."""
    if cfg.get('default_scope') == 'mmseg':
        return ConfigDict(type='mmseg.SegTTAModel')
    if cfg.get('default_scope') != 'mmdet':
        return ConfigDict(type='mmpretrain.AverageClsScoreTTA')
    network = cfg.model.get('model') or cfg.model
    if 'tta_model' not in cfg and (network.get('roi_head') or network).get('mask_head') is not None:
        raise ConfigError(
            '--tta: mmdet merges boxes, not masks; give your own tta_model in the config, or '
            'test without --tta'
        )
    nms = dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)
    return ConfigDict(type='DetTTAModel', tta_cfg=nms)  # mmdet registers it at the root


def _flip_pipeline(cfg: Config, pipeline: list[ConfigDict]) -> list[ConfigDict]:
    """The test pipeline, branching into image and mirror image before the last step.

    mmseg loads label maps after that, or they would be mirrored, too.
    """
    pack, steps = deepcopy(pipeline[-1]), deepcopy(pipeline[:-1])
    labels = []
    if cfg.get('default_scope') == 'mmseg':
        labels = [s for s in steps if 'LoadAnnotations' in str(s['type'])]
        steps = [s for s in steps if s not in labels]
    if cfg.get('default_scope') == 'mmdet':
        keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
        pack.meta_keys = (*keys, 'flip', 'flip_direction')
    flips = [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)]
    after = [[step] for step in (*labels, pack)]
    return [*steps, ConfigDict(type='TestTimeAug', transforms=[flips, *after])]


def show_predictions(cfg: Config, show: bool, folder: str | None, wait_time: float) -> None:
    """Turn the visualization hook on, with the arguments of its library.

    Raises:
        ConfigError: If the config has no visualization hook.
    """
    hook: Any = cfg.get('default_hooks', {}).get('visualization')
    if not hook:
        raise ConfigError(
            '--show and --show-dir need the visualization hook; write '
            "default_hooks = dict(visualization=dict(type='DetVisualizationHook')), "
            "'SegVisualizationHook' for mmseg, or 'VisualizationHook' for mmpretrain"
        )
    is_classification = cfg.get('default_scope') not in ('mmdet', 'mmseg')
    switch = 'enable' if is_classification else 'draw'
    hook.update({switch: True, 'show': show, 'wait_time': wait_time})
    if folder and cfg.get('default_scope') == 'mmseg':
        cfg.visualizer['save_dir'] = folder
    elif folder:
        hook['out_dir' if is_classification else 'test_out_dir'] = folder
