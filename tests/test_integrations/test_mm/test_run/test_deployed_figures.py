# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Packed file and latency at the end of a run, on a stored classifier."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip('mmpretrain')

from mmengine.dataset import pseudo_collate

from gplq_mm.integrations.mm.checkpoints.checkpoint_io import read_checkpoint
from gplq_mm.integrations.mm.checkpoints.quantized_model import QuantizedSource
from gplq_mm.integrations.mm.hook import GPLQHook
from gplq_mm.integrations.mm.run import deployed_figures
from gplq_mm.integrations.mm.run.deployed_figures import report_deployed
from gplq_mm.integrations.mm.run.run_report import RunReport
from tests.helpers.checkpoint_fixtures import unpacked


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.setattr(deployed_figures, 'BLOCKS', 1)
    monkeypatch.setattr(deployed_figures, 'MOST_CALLS', 2)
    final = unpacked('vit_final', tmp_path)
    model = QuantizedSource(str(final)).quantized()
    checkpoint = read_checkpoint(final)
    state = {k: v for k, v in model.state_dict().items() if '_quantizer.' not in k}
    torch.save(dict(state_dict=state), tmp_path / 'float.pth')
    checkpoint['gplq']['float_checkpoint'] = {'path': str(tmp_path / 'float.pth')}
    size = model.backbone.img_size
    image = dict(inputs=torch.zeros(3, *size, dtype=torch.uint8), data_samples=_sample())
    images = SimpleNamespace(dataset=[image], indices=[0], collate=pseudo_collate)
    return SimpleNamespace(
        folder=tmp_path,
        final=final,
        model=model,
        checkpoint=checkpoint,
        images=images,
        report=RunReport(str(tmp_path), resume=False),
    )


def _sample():
    from mmpretrain.structures import DataSample

    return DataSample()


@pytest.mark.parametrize('form', ['pth', 'safetensors'])
def test_file_and_latency_are_reported_and_the_model_restored(run, form) -> None:
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    engine = run.model.gplq.engine
    report_deployed(run.model, run.checkpoint, run.final, form, run.images, run.report)
    stage2, fp32 = run.report.data['stage2'], run.report.data['fp32']
    path = run.folder / stage2['packed_file']
    assert path.name == f'vit_final_packed.{form}'
    assert stage2['disk_bytes'] == path.stat().st_size < run.final.stat().st_size
    assert stage2['latency_ratio'] == pytest.approx(fp32['latency_ms'] / stage2['latency_ms'])
    again = read_checkpoint(path)
    model = QuantizedSource(str(path)).quantized()
    assert again['meta'] == run.checkpoint['meta']
    x = torch.randn(1, 3, *run.model.backbone.img_size)
    with torch.no_grad():
        assert torch.equal(model(x), run.model(x))
    assert run.model.gplq.engine == engine and run.model.head.layers.head.engine == engine
    assert all(torch.equal(v, before[k]) for k, v in run.model.state_dict().items())


def test_without_the_float_checkpoint_there_is_no_ratio(run) -> None:
    run.checkpoint['gplq']['float_checkpoint'] = {'path': 'gone.pth'}
    report_deployed(run.model, run.checkpoint, run.final, 'pth', run.images, run.report)
    assert run.report.data['stage2']['latency_ms'] > 0
    assert 'latency_ratio' not in run.report.data['stage2'] and 'fp32' not in run.report.data


def test_none_writes_nothing(run) -> None:
    files = sorted(run.folder.iterdir())
    report_deployed(run.model, run.checkpoint, run.final, None, run.images, run.report)
    assert sorted(run.folder.iterdir()) == files and run.report.data == {}


def test_another_format_is_refused() -> None:
    assert GPLQHook(deploy=None).deploy is None
    with pytest.raises(ValueError, match=r"deploy='onnx'.*tools/deploy.py writes ONNX"):
        GPLQHook(deploy='onnx')
