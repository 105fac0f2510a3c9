# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import pytest
import torch

from gplq_mm.__main__ import main
from tests.helpers.exported import finished_vit
from tests.helpers.plain_vit import pixels

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxscript', reason='needs onnxscript')
pytest.importorskip('onnxruntime', reason='needs onnxruntime')

from gplq_mm.integrations.onnx.onnx_export import export  # noqa: E402
from gplq_mm.integrations.onnx.onnx_model import OnnxModel  # noqa: E402
from gplq_mm.integrations.onnx.precision import precisions  # noqa: E402


@torch.no_grad()
def test_codes_are_symmetric_int8_and_outputs_agree(tmp_path) -> None:
    model, images = finished_vit('w4a4_v1'), pixels(8, seed=3)
    exported = export(model, tmp_path / 'x.onnx', images[:2], style='qdq')
    graph = onnx.load(tmp_path / 'x.onnx').graph
    zero_points = {x.name: x for x in graph.initializer}
    quantizing = [n for n in graph.node if n.op_type in ('QuantizeLinear', 'DequantizeLinear')]
    assert len(quantizing) >= 2 * len([e for e in exported if not e.reason])
    for node in quantizing:
        stored = zero_points[node.input[2]]
        assert stored.data_type == onnx.TensorProto.INT8
        assert not onnx.numpy_helper.to_array(stored).any()
    out = OnnxModel(tmp_path / 'x.onnx')(images)[0]
    torch.testing.assert_close(out, model(images), atol=1e-5, rtol=1e-5)
    assert [e.operation for e in exported if e.reason] == ['patch_embed']  # 8 bits, asymmetric
    floats = {
        p.operation: p.outside for p in precisions(tmp_path / 'x.onnx') if 'float' in p.precision
    }
    assert floats['patch_embed'] == '' and not any(floats.values())  # all are in the scope
    assert main(['inspect', str(tmp_path / 'x.onnx'), '--strict']) == 1
