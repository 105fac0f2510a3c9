# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""A model after stage 2, built from its config and checkpoint, for deployment."""

from typing import Any

from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import nn

from ....deployment.finished_check import check_finished
from ....ptq.corrections.side_branch import compensated_blocks
from ....registry import MODELS
from ..checkpoints.checkpoint_io import read_checkpoint
from ..checkpoints.former_recipe import take_former_form_
from ..checkpoints.run_checkpoint import (
    FINAL_NAME,
    KEY,
    STAGE1_NAME,
    check_quantized,
    is_quantized_checkpoint,
)
from ..launch.errors import ConfigError
from ..launch.preflight import check_checkpoint
from ..launch.settings_check import is_gplq


def read_finished(cfg: Config, config: str, path: str) -> dict[str, Any]:
    """Read the checkpoint of a finished run, and refuse what cannot be deployed.

    Args:
        cfg: Config of the run.
        config: Its path, for messages.
        path: ``gplq_final.pth``, or a packed file.

    Raises:
        ConfigError: If the config is float, or the checkpoint is missing, damaged, float or from
            before stage 2.
    """
    if not is_gplq(cfg):
        raise ConfigError(
            f'{config} has no model of type gplq_mm.GPLQ; give the config that the checkpoint was '
            'made with'
        )
    check_checkpoint(path)
    checkpoint = read_checkpoint(path)
    if not is_quantized_checkpoint(checkpoint):
        raise ConfigError(
            f'{path} is a float checkpoint: it has no integer weights; run tools/train.py with '
            f'{config} and give its {FINAL_NAME}'
        )
    stage = checkpoint[KEY]['stage']
    if stage != 'stage2':
        remedy = (
            f'quantize them with tools/ptq.py {config} {path} and give the {FINAL_NAME} that it '
            'writes'
            if stage == 'stage1'
            else f"give the run's {FINAL_NAME}, not its {STAGE1_NAME} or gplq_calibrated.pth"
        )
        raise ConfigError(f'{path} is from {stage}: its weights are float; {remedy}')
    return checkpoint


def build_finished(cfg: Config, checkpoint: dict[str, Any]) -> nn.Module:
    """Build the config's model and load a finished checkpoint.

    Args:
        cfg: GPLQ config.
        checkpoint: Of ``read_finished``.

    Returns:
        The model in evaluation mode, on the CPU.

    Raises:
        ValueError: If the checkpoint was made with another recipe or for another model, or has
            float weights.
    """
    model_cfg = cfg.model.copy()
    if cfg.get('data_preprocessor'):
        model_cfg.setdefault('data_preprocessor', cfg.data_preprocessor)
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
        model = MODELS.build(model_cfg)
    take_former_form_(model, checkpoint)
    check_quantized(model, checkpoint)
    model.load_state_dict(checkpoint['state_dict'])
    check_finished(model)
    return model.eval()


def float_parts(model: Any) -> list[str]:
    """Parts of a finished model that compute in float, one line each; empty if there are none.

    Args:
        model: Of ``build_finished``.
    """
    branches = [n for n, b in compensated_blocks(model).items() if b.compensation.is_fitted]
    lines = []
    if branches:
        lines.append(
            f'{len(branches)} side branches of QwT stay float, in file and computation, first '
            f'{branches[0]}'
        )
    kept = [name or type(model).__name__ for name, _ in model.gplq.coverage.kept_float]
    if kept:
        lines.append(f'{len(kept)} operations stay float, first {kept[0]}')
    return lines
