# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
from argparse import Namespace

import pytest
import torch

import gplq_mm
from gplq_mm.integrations.mm.deployment.any_size import any_size
from gplq_mm.integrations.mm.deployment.exportable import exportable, integer_batch
from gplq_mm.integrations.mm.launch.errors import ConfigError
from gplq_mm.registry import MODELS
from tests.helpers.calibration import calibrate_activations, calibrate_weights
from tests.helpers.mm_models import retinanet, run_detector

pytest.importorskip('onnxscript', reason='needs onnx and onnxscript')
pytest.importorskip('onnxruntime', reason='needs onnxruntime')

SIZE = (32, 48)


@pytest.fixture(scope='module')
def detector():
    torch.manual_seed(0)
    model, images = retinanet(), torch.randn(4, 3, *SIZE)
    gplq_mm.quantize(model, 'w4a4')
    model.eval()
    with torch.no_grad():
        calibrate_activations(model, lambda: run_detector(model, images))
        calibrate_weights(model)
    return model


@pytest.fixture(scope='module')
def file(detector, tmp_path_factory):
    from gplq_mm.integrations.mm.deployment.runtime_formats import write_onnx

    path = tmp_path_factory.mktemp('deployed') / 'backbone.onnx'
    args = Namespace(onnx_style=None, sizes=list(SIZE))
    assert write_onnx(detector, None, args, path) == [path]
    return path


@torch.no_grad()
def test_heads_get_the_same_maps(detector, file) -> None:
    images = torch.randn(3, 3, *SIZE, generator=torch.Generator().manual_seed(5))
    expected = run_detector(detector, images)
    deployed = retinanet()
    deployed.load_state_dict(
        {k: v for k, v in detector.state_dict().items() if k.startswith('bbox_head')}, strict=False
    )
    deployed.backbone = MODELS.build(dict(type='gplq_mm.DeployedBackbone', file=str(file)))
    deployed.neck = None
    found = run_detector(deployed.eval(), images)
    for own, others in zip(found, expected, strict=True):
        for x, y in zip(own, others, strict=True):
            assert x.shape == y.shape
            assert (x - y).abs().mean() <= 0.02 * y.abs().mean()


@torch.no_grad()
def test_another_size_is_refused_or_padded(detector, file) -> None:
    cfg = dict(type='gplq_mm.DeployedBackbone', file=str(file))
    images = torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match='exported for images any x 3 x 32 x 48'):
        MODELS.build(cfg)(images)
    padded = MODELS.build({**cfg, 'pad': True})
    expected = exportable(detector)(images)
    assert [x.shape for x in padded(images)] == [x.shape for x in expected]
    with pytest.raises(ValueError, match='got 1 x 3 x 64 x 48'):
        padded(torch.zeros(1, 3, 64, 48))


def test_refuses_another_file_or_runtime(tmp_path) -> None:
    for bad in (dict(file='x.pth'), dict(file='x.onnx', runtime='openvino')):
        with pytest.raises(ValueError, match='write a file and the runtime of its suffix'):
            MODELS.build(dict(type='gplq_mm.DeployedBackbone', **bad))
    with pytest.raises(FileNotFoundError, match='no ONNX file'):
        MODELS.build(dict(type='gplq_mm.DeployedBackbone', file=str(tmp_path / 'x.onnx')))


@torch.no_grad()
def test_swin_takes_images_of_any_size(detector, tmp_path) -> None:
    from gplq_mm.integrations.mm.deployment.runtime_formats import write_onnx

    path = tmp_path / 'x.onnx'
    write_onnx(detector, None, Namespace(onnx_style=None, sizes=None), path)
    deployed = MODELS.build(dict(type='gplq_mm.DeployedBackbone', file=str(path)))
    for shape in ((1, 3, 32, 32), (2, 3, 37, 51)):
        images = torch.randn(*shape, generator=torch.Generator().manual_seed(7))
        for x, y in zip(deployed(images), exportable(detector)(images), strict=True):
            assert x.shape == y.shape
            assert (x - y).abs().mean() <= 0.02 * y.abs().mean()


def test_a_size_has_to_be_given_where_none_else_works(detector, tmp_path, monkeypatch) -> None:
    from gplq_mm.integrations.mm.deployment import runtime_formats

    def export(*args, **options):
        raise torch.onnx.OnnxExporterError('guard on a size')

    def other_size(out, images, expected) -> None:
        if images.shape[-2:] == runtime_formats.ANOTHER_SIZE:
            raise RuntimeError('x.onnx does not run')

    out = tmp_path / 'x.onnx'
    with pytest.raises(ConfigError, match='write --sizes H W'):
        runtime_formats.write(detector, None, out, export)
    monkeypatch.setattr(runtime_formats, 'verify', other_size)
    with pytest.raises(ConfigError, match='write --sizes H W'):  # a size became a number
        runtime_formats.write(detector, None, out, lambda *args, **options: [])
    attention = next(m for m in detector.modules() if hasattr(m, 'window_reverse'))
    monkeypatch.setattr(attention, 'pad_small_map', False, raising=False)
    with pytest.raises(ConfigError, match=r'attn has pad_small_map=False: .*write --sizes H W'):
        runtime_formats.write(detector, None, out, export)
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_any_size_changes_no_value(detector) -> None:
    part = exportable(detector)
    for size in ((32, 48), (37, 51), (30, 70)):
        images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))
        expected = part(images)
        with any_size(detector):
            found = part(images)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert not any('forward' in vars(m) for m in detector.modules())


@torch.no_grad()
def test_windows_are_put_together_as_by_the_library(detector) -> None:
    part, images = exportable(detector), torch.randn(3, 3, *SIZE)
    expected = part(images)
    with integer_batch(detector):
        found = part(images)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert not any('window_reverse' in vars(m) for m in detector.modules())
