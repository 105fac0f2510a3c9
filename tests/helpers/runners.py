# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""GPLQ runs inside the test process, on the tiny classification project."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner

from gplq_mm.integrations.mm import (
    builder,  # noqa: F401
    hook,  # noqa: F401
)
from gplq_mm.integrations.mm.launch.config import override_data_root

from .tiny_projects import TinyProject

RECIPE = {
    'base': 'w4a4',
    'calibration': {'num_images': 4},
    'activation': {'observer': 'minmax'},
    'weight': {'ptq': 'minmax'},
}


def float_config(project: TinyProject) -> Config:
    """The project's float config, its data named by absolute paths."""
    cfg = Config.fromfile(project.config)
    override_data_root(cfg, project.root / cfg.data_root)
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        cfg[name].dataset.serialize_data = False  # MMEngine's garbage collection takes long
    return cfg


def build_float(cfg: Config, seed: int = 0) -> torch.nn.Module:
    """The float model with random weights."""
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        torch.manual_seed(seed)
        model = MODELS.build(cfg.model)
        model.init_weights()
        head = model.head if hasattr(model, 'head') else model.model.head  # of TimmClassifier
        for parameter in head.parameters():  # zeros would leave nothing to learn
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def save_float(
    project: TinyProject,
    path: Path,
    edit: Callable[[dict[str, torch.Tensor]], object] = lambda state: None,
) -> Path:
    """Write a float checkpoint with random weights, after `edit` changed its state dict."""
    state = build_float(float_config(project)).state_dict()
    edit(state)
    torch.save({'state_dict': state}, path)
    return path


def gplq_config(
    project: TinyProject,
    checkpoint: Path | None,
    work_dir: Path,
    recipe: Mapping[str, Any] = RECIPE,
    hooks: tuple[Mapping[str, Any], ...] = (),
    **options: Any,
) -> Config:
    """The project's config turned into a GPLQ run of one epoch; `options` override it."""
    cfg = float_config(project)
    cfg.model = {
        **cfg.model,
        'type': 'gplq_mm.GPLQ',
        'float_type': cfg.model.type,
        'recipe': recipe,
    }
    cfg.merge_from_dict(
        {
            'load_from': checkpoint and os.fspath(checkpoint),
            'work_dir': os.fspath(work_dir),
            'custom_hooks': [dict(type='gplq_mm.GPLQHook'), *hooks],
            'param_scheduler': [],
            'randomness': dict(seed=3),
            'log_level': 'WARNING',
            **options,
        }
    )
    cfg.optim_wrapper = dict(constructor='gplq_mm.GPLQOptimWrapperConstructor')
    return cfg


_count = iter(range(10**6))


def make_runner(cfg: Config) -> Runner:
    """A runner that shares no message hub with an earlier one."""
    cfg.experiment_name = f'test_run_{next(_count)}'
    return Runner.from_cfg(cfg)
