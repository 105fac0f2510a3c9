# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Whole detectors through the scripts in `tools/model_converters`, from other projects' names."""

import re
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import init_default_scope
from torch import Tensor

pytest.importorskip('mmdet')
pytest.importorskip('mmpretrain')

from gplq_mm.integrations.mm.checkpoints.checkpoint_io import read_checkpoint
from gplq_mm.registry import MODELS

ROOT = Path(__file__).resolve().parents[4]


@dataclass(frozen=True)
class Project:
    """Another project's detector.

    Attributes:
        script: Its converter.
        base: Float config of the target.
        shrink: Lines that make the target small.
        names: How a backbone tensor of the target is called there.
    """

    script: str
    base: str
    shrink: str
    names: tuple[tuple[str, str], ...]

    def source_name(self, key: str) -> str:
        for pattern, replacement in self.names if key.startswith('backbone.') else ():
            key = re.sub(pattern, replacement, key)
        return key


VITDET = Project(
    'vitdet_to_gplq.py',
    'mask_rcnn_vit-b_coco.py',
    """
arch = dict(num_layers=3, embed_dims=32, num_heads=4, feedforward_channels=48,
            global_attn_indexes=[1])
model = dict(backbone=dict(arch=arch, img_size=64), neck=dict(backbone_channel=32),
             roi_head=dict(bbox_head=dict(fc_out_channels=4)))
""",
    (
        ('patch_embed.projection', 'patch_embed.proj'),
        (r'\.ln', '.norm'),
        (r'ffn\.layers\.0\.0', 'mlp.fc1'),
        (r'ffn\.layers\.1', 'mlp.fc2'),
        (r'layers\.(\d+)', r'blocks.\1'),
    ),
)
SWIN = Project(
    'swin_to_gplq.py',
    'cascade_mask_rcnn_swin-t_coco.py',
    """
model = dict(backbone=dict(embed_dims=8, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8]),
             neck=dict(in_channels=[8, 16, 32, 64]))
""",
    (
        ('patch_embed.projection', 'patch_embed.proj'),
        (r'attn\.w_msa', 'attn'),
        (r'ffn\.layers\.0\.0', 'mlp.fc1'),
        (r'ffn\.layers\.1', 'mlp.fc2'),
        (r'stages\.', 'layers.'),
    ),
)


@pytest.fixture(params=[VITDET, SWIN], ids=['vitdet', 'swin'])
def project(request) -> Project:
    return request.param


@pytest.fixture
def config(project, tmp_path) -> Path:
    path = tmp_path / 'shrunken.py'
    path.write_text(f"_base_ = '{ROOT}/configs/gplq/_base_/{project.base}'\n{project.shrink}")
    return path


@pytest.fixture
def target(config) -> dict[str, Tensor]:
    init_default_scope('mmdet')
    return MODELS.build(Config.fromfile(config).model).state_dict()


@pytest.fixture
def source(project, target, tmp_path) -> Path:
    """A published-like checkpoint: other names, pretraining-size positions, MMEngine's extras."""
    state = {project.source_name(key): value for key, value in target.items()}
    assert len(state) == len(target)
    if project is VITDET:
        state['backbone.pos_embed'] = torch.randn(1, 1 + 14 * 14, 32)
    history = dict(log_scalars={'train/loss': HistoryBuffer([1.0], [1])})
    path = tmp_path / 'source.pth'
    meta = dict(CLASSES=('cat', 'dog'), epoch=36)
    torch.save(dict(state_dict=state, message_hub=history, meta=meta), path)
    return path


@pytest.fixture
def run(project, monkeypatch):
    def run_script(*arguments: object) -> None:
        script = str(ROOT / 'tools/model_converters' / project.script)
        monkeypatch.setattr(sys, 'argv', [script, *map(str, arguments)])
        runpy.run_path(script, run_name='__main__')

    return run_script


def test_round_trip(run, source, target, config, tmp_path, capsys):
    out = tmp_path / 'new' / 'out.pth'
    run(source, out, '--config', config)
    assert f'{len(target)} tensors -> {out}' in capsys.readouterr().out
    written = read_checkpoint(out)
    assert written['meta'] == {
        'converted_from': 'source.pth',
        'dataset_meta': {'classes': ('cat', 'dog')},
    }
    assert list(written['state_dict']) == list(target)
    for key, value in written['state_dict'].items():
        assert value.shape == target[key].shape
        if key != 'backbone.pos_embed' and '.downsample.' not in key:
            assert torch.equal(value, target[key]), key


def test_errors_are_one_line_and_leave_no_file(run, project, source, config, tmp_path, capsys):
    out = tmp_path / 'out.pth'
    for bad in (tmp_path / 'absent.pth', config):
        with pytest.raises(SystemExit, match='1'):
            run(bad, out, '--config', config)
        assert capsys.readouterr().err.count('\n') == 1
    checkpoint = torch.load(source, weights_only=False)
    checkpoint['state_dict']['backbone.surplus'] = torch.ones(1)
    torch.save(checkpoint, source)
    with pytest.raises(SystemExit, match='1'):
        run(source, out, '--config', config)
    message = '1 unexpected, the target has no such key: backbone.surplus'
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_help_names_the_public_checkpoint(run, capsys):
    with pytest.raises(SystemExit, match='0'):
        run('--help')
    assert re.search(r'https://\S+', capsys.readouterr().out)
