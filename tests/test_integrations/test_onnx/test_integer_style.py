# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import pytest
import torch

from gplq_mm.ops import operations
from tests.helpers.exported import Layers, Products, finished_vit
from tests.helpers.plain_vit import pixels

pytest.importorskip('onnxscript', reason='needs onnx and onnxscript')
pytest.importorskip('onnxruntime', reason='needs onnxruntime')

from gplq_mm.integrations.onnx import integer_style
from gplq_mm.integrations.onnx.equality import compare, top1_agreement
from gplq_mm.integrations.onnx.onnx_export import export
from gplq_mm.integrations.onnx.onnx_model import OnnxModel


@pytest.mark.parametrize('build', [Layers, Products])
@torch.no_grad()
def test_every_quantizer_gives_the_bits_of_the_simulation(build, tmp_path) -> None:
    images = pixels(6)
    edges = torch.arange(-192, 192).view(2, 3, 8, 8) / 2 * 0.02
    model = build(images).eval()
    exported = export(model, tmp_path / 'x.onnx', images[:2])
    run = OnnxModel(tmp_path / 'x.onnx')
    for x in (images, edges, torch.zeros_like(edges), images * 100):
        for entry, found, expected in zip(exported, run(x), model(x), strict=True):
            if entry.reason:  # onnxruntime multiplies the scale into the weights of a Conv
                torch.testing.assert_close(found, expected)
            else:
                assert torch.equal(found, expected), entry
    agreements = compare(model, tmp_path / 'x.onnx', images)
    assert {a.operation for a in agreements} == {e.operation for e in exported if not e.reason}
    assert all(a.num_codes and not a.flips and a.equal_output for a in agreements)


@torch.no_grad()
def test_what_has_no_integer_form_says_so() -> None:
    model = Layers(pixels(6))
    reasons = {name: integer_style.refusal(o) for name, o in operations(model).items()}
    refused = {name for name, reason in reasons.items() if reason}
    assert refused == {'conv.padded_bytes', 'conv.reflected'}
    assert 'zero points differ' in reasons['conv.padded_bytes']
    model = Products(pixels(6))
    reasons = {name: integer_style.refusal(o) for name, o in operations(model).items()}
    assert {name for name, reason in reasons.items() if reason} == {'products.row_bytes'}


def test_bytes_that_could_saturate_are_unsigned() -> None:
    assert integer_style.needs_unsigned(255, 127)
    assert not integer_style.needs_unsigned(255, 8)
    layers = operations(Layers(pixels(6)))
    assert integer_style.precision(layers['linear.bytes']) == 'uint8 x uint8'
    assert integer_style.precision(layers['linear.channel']) == 'uint8 x int8'


@torch.no_grad()
def test_a_model_agrees_and_flips_are_counted(tmp_path) -> None:
    model, images = finished_vit(), pixels(8, seed=3)
    export(model, tmp_path / 'x.onnx', images[:2])
    logits = OnnxModel(tmp_path / 'x.onnx')(images)[0]
    assert top1_agreement(logits, model(images)) == 1
    agreements = compare(model, tmp_path / 'x.onnx', images)
    assert len(agreements) == len(operations(model))
    assert sum(a.flips for a in agreements) == 0
    assert all(a.equal_output for a in agreements)
    other = compare(model, tmp_path / 'x.onnx', images * 1.001)
    assert sum(a.flips for a in other) == 0
    with pytest.raises(ValueError, match='not those of this model'):
        compare(Layers(images), tmp_path / 'x.onnx', images)
