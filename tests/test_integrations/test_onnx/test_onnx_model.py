# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
from pathlib import Path

import pytest

from gplq_mm.integrations.onnx import onnx_model, packages


def test_a_missing_package_gives_the_command(monkeypatch) -> None:
    monkeypatch.setattr(packages, 'is_installed', lambda name: False)
    with pytest.raises(ModuleNotFoundError, match='pip install onnxruntime'):
        onnx_model.OnnxModel('x.onnx')


def test_refuses_missing_and_damaged_files(tmp_path) -> None:
    pytest.importorskip('onnxruntime', reason='needs onnxruntime')
    with pytest.raises(FileNotFoundError, match='no ONNX file'):
        onnx_model.OnnxModel(tmp_path / 'x.onnx')
    (tmp_path / 'x.onnx').write_bytes(b'truncated')
    with pytest.raises(ValueError, match='cannot be loaded by onnxruntime'):
        onnx_model.OnnxModel(tmp_path / 'x.onnx')


def test_sizes() -> None:
    onnx_model.check_size(Path('x'), ('batch', 3, 8, 8), (7, 3, 8, 8))
    with pytest.raises(ValueError, match='any x 3 x 8 x 8, got 2 x 3 x 8 x 9'):
        onnx_model.check_size(Path('x'), ('batch', 3, 8, 8), (2, 3, 8, 9))
