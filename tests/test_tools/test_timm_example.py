# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The example runs, needs no OpenMMLab library, and loses little."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('timm')
pytest.importorskip('sklearn')

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / 'examples' / 'timm_vit.py'
WITHOUT_MM = """
import runpy, sys
for blocked in ('mmengine', 'mmcv', 'mmdet', 'mmpretrain'):
    sys.modules[blocked] = None
path, *sys.argv[1:] = sys.argv[1:]
runpy.run_path(path, run_name='__main__')
"""


def test_four_bits_are_near_the_float_model() -> None:
    command = [sys.executable, '-W', 'ignore', '-c', WITHOUT_MM, str(EXAMPLE), '10']
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    scores = [float(s) for s in re.findall(r'\d+\.\d', done.stdout)]
    assert len(scores) == 3 and done.stdout.startswith('FP32 | W32A4 | W4A4')
    assert scores[0] > 80
    assert min(scores[1:]) > scores[0] - 8


def test_it_is_short() -> None:
    assert len(EXAMPLE.read_text(encoding='utf-8').splitlines()) <= 40
