# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""timm's networks, built without weights, and mmpretrain's with the converted weights agree."""

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

pytest.importorskip('mmpretrain')
pytest.importorskip('timm', reason='timm is not installed: pip install timm')

import timm

from gplq_mm.integrations.mm.checkpoints.checkpoint_io import read_checkpoint
from gplq_mm.integrations.mm.converters.timm_checkpoint import convert_timm_state_dict, rename_key

ROOT = Path(__file__).resolve().parents[4]
_VIT = dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=5)
_BLOCK = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=64)
_BACKBONE = dict(type='VisionTransformer', arch=_BLOCK, img_size=32, patch_size=8)
_HEAD = dict(type='VisionTransformerClsHead', num_classes=5, in_channels=16)
_LINEAR = dict(type='LinearClsHead', num_classes=5)

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    'vit': ('vit_tiny_patch16_224', _VIT, dict(backbone=_BACKBONE, head=_HEAD)),
    'vit_average': (
        'vit_base_patch16_224.mae',
        {**_VIT, 'global_pool': 'avg'},
        dict(
            backbone={**_BACKBONE, 'out_type': 'avg_featmap', 'final_norm': False},
            head={**_LINEAR, 'in_channels': 16},
        ),
    ),
    'vit_layer_scale': (
        'vit_small_patch14_dinov2',
        _VIT,
        dict(backbone={**_BACKBONE, 'layer_scale_init_value': 1.0}, head=_HEAD),
    ),
    'deit': ('deit_tiny_patch16_224', _VIT, dict(backbone=_BACKBONE, head=_HEAD)),
    'deit_distilled': (
        'deit_tiny_distilled_patch16_224',
        _VIT,
        dict(
            backbone={**_BACKBONE, 'type': 'DistilledVisionTransformer'},
            head={**_HEAD, 'type': 'DeiTClsHead'},
        ),
    ),
    'deit3': (
        'deit3_small_patch16_224',
        _VIT,
        dict(backbone={**_BACKBONE, 'layer_scale_init_value': 1.0}, head=_HEAD),
    ),
    'swin': (
        'swin_tiny_patch4_window7_224',
        dict(
            img_size=64,
            patch_size=4,
            window_size=4,
            embed_dim=8,
            depths=(2, 2, 2),
            num_heads=(1, 2, 4),
            num_classes=5,
        ),
        dict(
            backbone=dict(
                type='SwinTransformer',
                arch=dict(embed_dims=8, depths=[2, 2, 2], num_heads=[1, 2, 4]),
                img_size=64,
                window_size=4,
                out_indices=(2,),
            ),
            neck=dict(type='GlobalAveragePooling'),
            head={**_LINEAR, 'in_channels': 32},
        ),
    ),
}


def random_(model: nn.Module) -> nn.Module:
    """Every parameter random, so that no two tensors can be exchanged unseen."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def timm_model(case: str) -> nn.Module:
    name, options, _ = CASES[case]
    return random_(timm.create_model(name, pretrained=False, **options)).eval()


def our_model(case: str) -> nn.Module:
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(dict(type='ImageClassifier', **CASES[case][2]))
    model.eval()
    return model


@pytest.mark.parametrize('case', CASES)
def test_outputs_are_equal(case):
    theirs, ours = timm_model(case), our_model(case)
    ours.load_state_dict(convert_timm_state_dict(theirs.state_dict(), ours.state_dict()))
    images = torch.randn(2, 3, *[64 if case == 'swin' else 32] * 2)
    with torch.no_grad():
        expected, found = theirs(images), ours(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def as_published_by_swin(state: dict[str, Tensor], target: dict[str, Tensor]) -> dict[str, Any]:
    """The layout of Swin's own files: merging a stage earlier, a bare head, constant buffers."""
    old: dict[str, Any] = {}
    for key, value in state.items():
        if '.downsample.' in key:
            stage, rest = key.removeprefix('layers.').split('.', 1)
            key = f'layers.{int(stage) - 1}.{rest}'
        old[key.replace('head.fc.', 'head.')] = value
    name = 'attn.w_msa.relative_position_index'
    old['layers.0.blocks.1.attn.relative_position_index'] = target[
        f'backbone.stages.0.blocks.1.{name}'
    ]
    old['layers.0.blocks.1.attn_mask'] = torch.zeros(4, 16, 16)
    return {'model': old}


def test_swins_own_layout_converts_to_the_same():
    state, target = timm_model('swin').state_dict(), our_model('swin').state_dict()
    expected = convert_timm_state_dict(state, target)
    found = convert_timm_state_dict(as_published_by_swin(state, target), target)
    assert list(found) == list(expected) == list(target)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_deits_own_names_of_layer_scale():
    state, target = timm_model('deit3').state_dict(), our_model('deit3').state_dict()
    own = {re.sub(r'ls(\d)\.gamma', r'gamma_\1', key): value for key, value in state.items()}
    assert own.keys() != state.keys()
    expected = convert_timm_state_dict(state, target)
    found = convert_timm_state_dict({'model': own}, target)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_another_window_is_refused():
    state, target = timm_model('swin').state_dict(), our_model('swin').state_dict()
    state['layers.0.blocks.0.attn.relative_position_index'] = torch.zeros(49, 49, dtype=torch.long)
    with pytest.raises(ValueError, match='another window size'):
        convert_timm_state_dict(state, target)


def test_register_tokens_are_named():
    """mmpretrain's ViT has none: the weights of DINOv2 with registers cannot be taken."""
    model = timm.create_model('vit_small_patch14_reg4_dinov2', pretrained=False, **_VIT)
    with pytest.raises(ValueError, match='1 unexpected, the target has no such key: reg_token'):
        convert_timm_state_dict(model.state_dict(), our_model('vit_layer_scale').state_dict())


def test_unknown_names_stay_as_they_are():
    assert rename_key('blocks.0.attn.q_norm.weight') == 'blocks.0.attn.q_norm.weight'


def run_tool(monkeypatch, *arguments: object) -> None:
    script = str(ROOT / 'tools/model_converters/timm_to_mmpretrain.py')
    monkeypatch.setattr(sys, 'argv', [script, *map(str, arguments)])
    runpy.run_path(script, run_name='__main__')


def test_tool_takes_a_gplq_config(monkeypatch, tmp_path, capsys):
    torch.save(timm_model('deit_distilled').state_dict(), tmp_path / 'timm.pth')
    config = tmp_path / 'config.py'
    config.write_text(
        "default_scope = 'mmpretrain'\n"
        "model = dict(type='gplq_mm.GPLQ', float_type='ImageClassifier', recipe='w4a4', "
        f'**{CASES["deit_distilled"][2]!r})\n'
    )
    out = tmp_path / 'out.pth'
    run_tool(monkeypatch, tmp_path / 'timm.pth', out, '--config', config)
    assert f'-> {out}' in capsys.readouterr().out
    our_model('deit_distilled').load_state_dict(read_checkpoint(out)['state_dict'])


def test_tool_refuses_in_one_message(monkeypatch, tmp_path, capsys):
    torch.save({**timm_model('vit').state_dict(), 'extra.bias': torch.ones(1)}, tmp_path / 'a.pth')
    with pytest.raises(SystemExit, match='1'):
        run_tool(monkeypatch, tmp_path / 'a.pth', tmp_path / 'out.pth')
    assert '1 unexpected, the target has no such key: extra.bias' in capsys.readouterr().err
    assert not (tmp_path / 'out.pth').exists()
