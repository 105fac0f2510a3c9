# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""What can be deployed: the checkpoint of a finished run, with the config of this run."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip('mmpretrain')

from mmengine.config import Config

from gplq_mm.integrations.mm.deployment.finished_model import (
    build_finished,
    float_parts,
    read_finished,
)
from gplq_mm.integrations.mm.launch.errors import ConfigError
from gplq_mm.ptq.corrections.side_branch import attach_compensation, compensated_blocks
from tests.helpers.checkpoint_fixtures import unpacked


def config_of(path: Path) -> Config:
    return Config.fromstring(torch.load(path, weights_only=True)['meta']['cfg'], '.py')


def test_a_finished_run(tmp_path: Path) -> None:
    path = unpacked('vit_final', tmp_path)
    cfg = config_of(path)
    model: Any = build_finished(cfg, read_finished(cfg, 'c.py', str(path)))
    assert not model.training
    assert float_parts(model) == []
    attach_compensation(model)
    assert float_parts(model) == []
    name, block = list(compensated_blocks(model).items())[-1]
    width = len(block.compensation.bias)
    block.compensation.set_values(torch.eye(width), torch.ones(width))
    assert float_parts(model) == [
        f'1 side branches of QwT stay float, in file and computation, first {name}'
    ]


@pytest.mark.parametrize(
    ('stage', 'message'),
    [
        ('stage1', r'is from stage1: its weights are float; quantize them with tools/ptq.py c.py'),
        ('calibrated', "is from calibrated: its weights are float; give the run's gplq_final.pth"),
    ],
)
def test_an_earlier_stage_is_refused(stage: str, message: str, tmp_path: Path) -> None:
    path = unpacked(f'vit_{stage}', tmp_path)
    with pytest.raises(ConfigError, match=message):
        read_finished(config_of(path), 'c.py', str(path))


def test_float_and_missing_checkpoints_and_configs_are_refused(tmp_path: Path) -> None:
    path = unpacked('vit_final', tmp_path)
    cfg = config_of(path)
    torch.save({'state_dict': {'a': torch.zeros(1)}}, tmp_path / 'float.pth')
    with pytest.raises(ConfigError, match='is a float checkpoint: it has no integer weights; run'):
        read_finished(cfg, 'c.py', str(tmp_path / 'float.pth'))
    with pytest.raises(ConfigError, match='no checkpoint at'):
        read_finished(cfg, 'c.py', str(tmp_path / 'none.pth'))
    with pytest.raises(ConfigError, match='c.py has no model of type gplq_mm.GPLQ'):
        read_finished(Config(dict(model=dict(type='ImageClassifier'))), 'c.py', str(path))


def test_a_checkpoint_with_a_float_weight_is_refused(tmp_path: Path) -> None:
    path = unpacked('vit_final', tmp_path)
    cfg = config_of(path)
    checkpoint = read_finished(cfg, 'c.py', str(path))
    key = next(k for k in checkpoint['state_dict'] if k.endswith('weight_quantizer.calibrated'))
    checkpoint['state_dict'][key] = torch.tensor(False)
    with pytest.raises(ValueError, match=f'1 quantizers have no scale, first {key[:8]}'):
        build_finished(cfg, checkpoint)
