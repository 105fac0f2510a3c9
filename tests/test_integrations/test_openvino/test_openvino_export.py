# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import pytest
import torch

from gplq_mm.integrations import openvino
from gplq_mm.integrations.onnx import packages
from gplq_mm.ops import operations
from tests.helpers.exported import Layers, Products, finished_vit
from tests.helpers.plain_vit import pixels


def test_a_missing_package_gives_the_command(monkeypatch) -> None:
    monkeypatch.setattr(packages, 'is_installed', lambda name: name != 'openvino')
    with pytest.raises(ModuleNotFoundError, match='pip install openvino'):
        openvino.export  # noqa: B018


@pytest.mark.parametrize('build', [Layers, Products])
@torch.no_grad()
def test_every_quantizer_gives_the_values_of_the_simulation(build, tmp_path) -> None:
    pytest.importorskip('openvino', reason='needs openvino')
    pytest.importorskip('onnxscript', reason='needs onnx and onnxscript')
    images, others = pixels(6), pixels(16, seed=9)
    model = build(images).eval()
    exported = openvino.export(model, tmp_path / 'x.xml', images[:2])
    found = openvino.OpenVinoModel(tmp_path / 'x.xml')(others)
    for entry, x, expected in zip(exported, found, model(others), strict=True):
        assert (x - expected).abs().max() <= 1e-6 * expected.abs().max(), entry


@pytest.mark.parametrize('recipe', ['w4a4_v1', 'w3a3'])
@torch.no_grad()
def test_products_run_in_int8_and_outputs_agree(recipe, tmp_path) -> None:
    pytest.importorskip('openvino', reason='needs openvino')
    pytest.importorskip('onnxscript', reason='needs onnx and onnxscript')
    model, images = finished_vit(recipe), pixels(16, seed=3)
    path = tmp_path / 'x.xml'
    exported = openvino.export(model, path, images[:2])
    assert [e.operation for e in exported] == list(operations(model))
    floats = {e.operation for e in exported if e.reason}
    assert floats == {'patch_embed'}  # 8 bits saturate
    found = openvino.precisions(path)
    named = {p.operation: p.precision for p in found}
    assert not any(p.outside for p in found)
    expected = set(operations(model)) - floats
    assert expected <= named.keys()
    assert {named[name] for name in expected} <= {'int8', 'uint8'}
    run = openvino.OpenVinoModel(path)
    logits, simulated = run(images)[0], model(images)
    # an image without a flipped code is equal up to rounding, one with a flip is near
    errors = (logits - simulated).abs().amax(-1) / simulated.abs().max()
    assert (errors < 1e-5).float().mean() >= 0.2 and errors.mean() <= 0.2
    with pytest.raises(ValueError, match='got 2 x 3 x 8 x 9'):
        run(torch.zeros(2, 3, 8, 9))
    path.with_suffix('.bin').unlink()
    with pytest.raises(FileNotFoundError, match=r'x\.bin'):
        openvino.OpenVinoModel(path)


def test_a_truncated_file_is_refused(tmp_path) -> None:
    pytest.importorskip('openvino', reason='needs openvino')
    (tmp_path / 'x.xml').write_text('<?xml version="1.0"?><net name="x" version="11"><lay')
    (tmp_path / 'x.bin').touch()
    with pytest.raises(ValueError, match='cannot be loaded by OpenVINO'):
        openvino.OpenVinoModel(tmp_path / 'x.xml')


def test_refuses_another_suffix(tmp_path) -> None:
    pytest.importorskip('openvino', reason='needs openvino')
    pytest.importorskip('onnxscript', reason='needs onnx and onnxscript')
    with pytest.raises(ValueError, match=r'write .*x\.xml'):
        openvino.export(finished_vit('w4a4_v1'), tmp_path / 'x.onnx', pixels(2))
