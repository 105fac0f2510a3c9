# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import pytest
import torch
from torch import Tensor, nn

import gplq_mm
from gplq_mm.ops import operations
from tests.helpers.exported import Layers, Products, finished_vit
from tests.helpers.plain_vit import pixels

pytest.importorskip('onnxscript', reason='needs onnx and onnxscript')
pytest.importorskip('onnxruntime', reason='needs onnxruntime')

from gplq_mm.integrations.onnx import integer_style
from gplq_mm.integrations.onnx.equality import compare, top1_agreement
from gplq_mm.integrations.onnx.onnx_export import export
from gplq_mm.integrations.onnx.onnx_model import OnnxModel
from gplq_mm.integrations.onnx.precision import precisions


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


class RelativePositions(nn.Module):
    """Attentions of SAM on `(B, 16, 3, 4)`: logits of given queries and keys, and an output."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        from mmpretrain.models.backbones.vit_sam import Attention

        torch.manual_seed(0)
        self.layers = nn.ModuleList()
        for recipe in ('w4a4', 'w4a4_v1', 'w4a4'):  # a scale per query, one scale
            attention = Attention(16, 2, use_rel_pos=True, input_size=(3, 4))
            for table in (attention.rel_pos_h, attention.rel_pos_w):
                nn.init.normal_(table, std=0.5)
            tokens = images.permute(0, 2, 3, 1)
            gplq_mm.quantize(attention, recipe)
            gplq_mm.calibrate(attention, [tokens])
            gplq_mm.quantize_weights(attention, [tokens])
            self.layers.append(attention)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        query = images.unflatten(1, (2, 8)).flatten(3).transpose(2, 3)  # (B, heads, H * W, D)
        keys = query.flip(2).transpose(2, 3)
        logits = (layer.logits(query, keys, (3, 4), (3, 4)) for layer in self.layers[:2])
        return (*logits, self.layers[2](images.permute(0, 2, 3, 1)))


@torch.no_grad()
def test_a_query_shared_by_products_is_multiplied_as_integers(tmp_path) -> None:
    pytest.importorskip('mmpretrain')
    images, others = torch.randn(8, 16, 3, 4), torch.randn(4, 16, 3, 4)
    model, path = RelativePositions(images).eval(), tmp_path / 'x.onnx'
    exported = export(model, path, images[:2])
    assert not [e for e in exported if e.reason]
    assert {p.kind for p in precisions(path)} == {'MatMulInteger'}
    found, expected = OnnxModel(path)(others), model(others)
    assert all(torch.equal(x, y) for x, y in zip(found[:2], expected[:2], strict=True))
    assert (found[2] - expected[2]).abs().mean() <= 0.02 * expected[2].abs().mean()
    agreements = compare(model, path, others)
    assert {a.operation.rpartition('.')[2] for a in agreements[:3]} == {
        'qk_matmul',
        'rel_h_matmul',
        'rel_w_matmul',
    }
    assert all(a.num_codes and not a.flips and a.equal_output for a in agreements)
