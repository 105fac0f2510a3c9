# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The project is no package that pip installs: a stand-in with the same interface is."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('mmdet')
pytest.importorskip('mmpretrain')

STAND_IN = """
from mmpretrain.models.backbones.hivit import Mlp as _Mlp
from mmpretrain.models.backbones.vit_sam import Attention as _Attention

class Attention(_Attention):
    pass

class Mlp(_Mlp):
    pass
"""

CHECK = """
import torch
from torch import nn
from projects.ViTDet.vitdet.vit import Attention, Mlp
from gplq_mm.integrations.loading import load_adapters
from gplq_mm.convert import convert_
from tests.helpers.identity import assert_identity

assert 'mmdet_vitdet' in load_adapters()
model = nn.Sequential(Attention(16, 2, use_rel_pos=True, input_size=(3, 4)), Mlp(16, 32))
for parameter in model.parameters():
    nn.init.normal_(parameter, std=0.3)
report = assert_identity(model, [torch.randn(2, 3, 4, 16)], lambda m, x: m(x[0]))
assert report.counts == {'linear': 4, 'conv': 0, 'matmul': 4}, report.counts
rules = [dict(role='post_gelu', num_bits=7), dict(role='rel_pos', num_bits=6)]
convert_(model, dict(base='w4a4', scope='all', rules=rules), strict=True)
assert model[1].fc2.input_quantizer.spec.num_bits == 7
assert model[0].rel_h_matmul.rhs_quantizer.spec.num_bits == 6
"""


def test_attention_of_the_project(tmp_path: Path) -> None:
    package = tmp_path / 'projects' / 'ViTDet' / 'vitdet'
    package.mkdir(parents=True)
    (package / 'vit.py').write_text(STAND_IN, encoding='utf-8')
    root = Path(__file__).resolve().parents[5]
    script = f'import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(root)!r}]\n{CHECK}'
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', script], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
