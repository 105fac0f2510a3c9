# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The model of a GPLQ config as a workload of the stage-1 benchmark, on its own images."""

import copy
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from stage1_models import Batch, Workload, use_torchao
from torch import nn

from gplq_mm.analysis.start_error import float_state_of
from gplq_mm.calibration.activation_ranges import calibrate_activations
from gplq_mm.integrations.mm.checkpoints.checkpoint_io import read_checkpoint
from gplq_mm.integrations.mm.checkpoints.run_checkpoint import load_float_
from gplq_mm.integrations.mm.data.calibration_data import CalibrationSet
from gplq_mm.integrations.mm.launch.config import apply_cfg_options
from gplq_mm.integrations.mm.run.teacher import attach_teacher, pca_images
from gplq_mm.ops import set_engine


@dataclass
class ConfigWorkload(Workload):
    """Model, FP32 weights, calibration images and training images of a config.

    Attributes:
        cfg: The config.
        models: States stored between the engines; empty at first.
    """

    cfg: Any = None
    kept: dict[str, Any] = field(default_factory=dict)

    def build(self, engine: str, teacher: bool, options: dict[str, Any]) -> nn.Module:
        """As in the base class, from the config's FP32 checkpoint."""
        model_cfg = copy.deepcopy(self.cfg.model)
        if not teacher:
            model_cfg.recipe = without_mimicking(model_cfg.get('recipe', 'w4a4'))
        model = MODELS.build(model_cfg)
        load_float_(model, read_checkpoint(self.cfg.load_from))
        state = float_state_of(model)
        if engine == 'float':
            float_model = MODELS.build(copy.deepcopy(model.gplq.float_cfg))
            float_model.load_state_dict(state)
            return float_model.train()
        calibration = CalibrationSet.of_recipe(self.cfg, model.gplq.recipe)
        if 'calibrated' in self.kept:
            model.load_state_dict(self.kept['calibrated'])
        else:
            calibrate_activations(model, calibration.run_pass(model, 'calibration'))
            self.kept['calibrated'] = model.state_dict()
        if teacher:
            source = {'path': self.cfg.load_from, 'sha256': None}
            attach_teacher(model, source, state, pca_images(calibration))
        if engine == 'torchao':
            use_torchao(model)
        set_engine(model, {'type': 'fused', **options} if engine == 'fused' else 'reference')
        return model.train()


def workload_of(path: str, cfg_options: dict[str, Any], batch: int) -> ConfigWorkload:
    """Workload of a config file.

    Args:
        path: GPLQ config.
        cfg_options: Changes to it.
        batch: Images per step.
    """
    cfg = Config.fromfile(path)
    apply_cfg_options(cfg, cfg_options)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    loader = copy.deepcopy(cfg.train_dataloader)
    loader.update(num_workers=0, persistent_workers=False)
    images = _images(loader)

    def make(number: int, height: int, width: int) -> Batch:
        parts = [next(images) for _ in range(number)]
        return {key: [x for part in parts for x in part[key]] for key in parts[0]}

    scope = cfg.get('default_scope', 'mmengine')
    return ConfigWorkload(Path(path).stem, scope, None, make, (0, 0), None, cfg=cfg)


def _images(loader: Any) -> Any:
    """Training images one by one, endlessly."""
    loader.batch_size = 1
    loader.pop('batch_sampler', None)
    return iter(cycle(Runner.build_dataloader(loader, seed=0)))


def without_mimicking(recipe: Any) -> dict[str, Any]:
    """The recipe with the task loss only."""
    return {'base': recipe, 'mimic': None} if isinstance(recipe, str) else {**recipe, 'mimic': None}
