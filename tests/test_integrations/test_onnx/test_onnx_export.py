# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import pytest
import torch

import gplq_mm
from tests.helpers.exported import finished_vit
from tests.helpers.plain_vit import pixels, plain_vit

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxscript', reason='needs onnxscript')
pytest.importorskip('onnxruntime', reason='needs onnxruntime')

from gplq_mm.integrations.onnx.onnx_export import export  # noqa: E402
from gplq_mm.integrations.onnx.onnx_model import OnnxModel  # noqa: E402
from gplq_mm.integrations.onnx.precision import precisions  # noqa: E402


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp('onnx') / 'model.onnx'
    export(finished_vit(), path, pixels(2))
    return path


def test_weights_of_four_bits_take_four(file) -> None:
    graph = onnx.load(file).graph
    types = {x.name: x.data_type for x in graph.initializer if x.name.endswith('/weight_int4')}
    assert set(types.values()) == {onnx.TensorProto.INT4}
    assert 'blocks.0.mlp.0/weight_int4' in types and 'patch_embed/weight_int4' not in types


def test_nodes_have_names_of_operations_and_no_paths(file) -> None:
    names = {node.name for node in onnx.load(file).graph.node}
    assert {'blocks.0.attn.qk_matmul/MatMulInteger', 'patch_embed/ConvInteger'} <= names
    assert b'plain_vit.py' not in file.read_bytes()


def test_only_integers_are_multiplied(file) -> None:
    found = precisions(file)
    assert len(found) == 20  # two digits of both logarithmic operands
    assert {p.kind for p in found} == {'MatMulInteger', 'ConvInteger'}
    assert {p.precision for p in found} == {'uint8 x int8', 'uint8 x uint8'}
    assert found[0].operation == 'patch_embed'


def test_batch_is_dynamic_and_the_dispatcher_as_before(file) -> None:
    model, images = finished_vit(), pixels(5)
    assert OnnxModel(file)(images)[0].shape == (5, 3)
    from gplq_mm.ops import explain

    with torch.no_grad():
        assert 'export' not in explain(model.head, torch.zeros(1, 16), None)


@torch.no_grad()
def test_side_branches_of_qwt_and_layers_turned_off_run_in_float_and_are_no_fault(tmp_path) -> None:
    from gplq_mm.__main__ import main
    from gplq_mm.integrations.onnx.graph_passes import SIDE_BRANCH

    model, images = plain_vit(), pixels()
    rule = {'name': 'head', 'enabled': False}
    gplq_mm.quantize(model, dict(base='w4a4', rules=[rule], stage2=dict(compensation='qwt')))
    gplq_mm.calibrate(model, [images])
    gplq_mm.quantize_weights(model, [images])
    model.eval()
    path = tmp_path / 'x.onnx'
    export(model, path, images[:2])
    floats = {p.operation: p.outside for p in precisions(path) if 'float32' in p.precision}
    # the last block has no branch
    assert floats == {'head': 'turned off by a rule', 'blocks.0.compensation': SIDE_BRANCH}
    assert main(['inspect', str(path), '--strict']) == 0
    simulated = model(images)
    error = (OnnxModel(path)(images)[0] - simulated).abs().mean() / simulated.abs().mean()
    assert error <= 0.02
    gplq_mm.save(model, tmp_path / 'x.pth', packed=True)
    assert torch.equal(gplq_mm.load(tmp_path / 'x.pth', plain_vit())(images), simulated)


def test_refuses_what_is_not_finished(tmp_path) -> None:
    with pytest.raises(ValueError, match='is a float model'):
        export(plain_vit(), tmp_path / 'x.onnx', pixels(2))
    model = plain_vit()
    gplq_mm.quantize(model, 'w4a4')
    gplq_mm.calibrate(model, [pixels()])
    with pytest.raises(ValueError, match='after stage 2'):
        export(model, tmp_path / 'x.onnx', pixels(2))
    with pytest.raises(ValueError, match="style='fp8'"):
        export(finished_vit(), tmp_path / 'x.onnx', pixels(2), style='fp8')
    assert not list(tmp_path.iterdir())
