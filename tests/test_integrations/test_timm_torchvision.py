# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Transformers of timm and torchvision: off, at eight bits, in a training step, as stored.

After an intended change of coverage write the table anew, and look at the difference:
`PYTHONPATH=. python tests/test_integrations/test_timm_torchvision.py`
"""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip('timm')
pytest.importorskip('torchvision')

import gplq_mm
from gplq_mm.convert import convert_, quantizers, set_quantization
from gplq_mm.integrations.loading import load_adapters_of
from gplq_mm.ops import QuantMatMul
from tests.helpers.engines import assert_engines_agree, converted
from tests.helpers.identity import assert_identity
from tests.helpers.plain_models import MODELS, images, plain_model

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name('coverage_timm_torchvision.json')
W8A8 = dict(base='w8a8', calibration=dict(migrate=False, compensate=False))


def measure(name: str) -> dict[str, Any]:
    """Counts by kind, and how much stays float."""
    report = gplq_mm.quantize(plain_model(name))
    return {**report.counts, 'kept_float': len(report.kept_float)}


@pytest.mark.parametrize('name', MODELS)
def test_coverage_is_as_stored_and_every_product_is_quantized(name: str) -> None:
    stored = json.loads(TABLE.read_text(encoding='utf-8'))
    assert measure(name) == stored[name], f'intended? then run: {__doc__}'
    assert stored[name]['matmul'] == MODELS[name][2]
    assert set(stored) == set(MODELS)


@pytest.mark.parametrize('name', MODELS)
def test_off_is_the_float_model_with_its_attention_written_out(name: str) -> None:
    model, x = plain_model(name), images(name)
    load_adapters_of(model)
    assert_identity(model, [x], lambda m, x: m(x[0]))
    fused = plain_model(name, fused=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), fused(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', MODELS)
def test_eight_bits_are_close_and_values_on_the_grid_stay(name: str) -> None:
    model, x = plain_model(name, fused=True).eval(), images(name)
    expected = model(x)
    gplq_mm.quantize(model, W8A8)
    gplq_mm.calibrate(model, x.split(1))
    gplq_mm.quantize_weights(model, x.split(1))
    with torch.no_grad():
        error = (model(x) - expected).norm()
    assert 0 < error < 0.05 * expected.norm()
    caught: dict[str, Any] = {}
    products = {n: m for n, m in model.named_modules() if isinstance(m, QuantMatMul)}
    for n, product in products.items():
        product.register_forward_pre_hook(lambda _, args, n=n: caught.update({n: args}))
    with torch.no_grad():
        model(x)
        for n, product in products.items():
            on_grid = [
                quantizer(value)
                for quantizer, value in zip(
                    (product.lhs_quantizer, product.rhs_quantizer), caught[n], strict=True
                )
            ]
            exact = on_grid[0].double() @ on_grid[1].double()
            torch.testing.assert_close(product(*on_grid).double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', MODELS)
def test_inference_on_integers_equals_the_simulation(name: str) -> None:
    model, x = plain_model(name).eval(), images(name, 4)
    calibration = dict(migrate=False, compensate=False)
    gplq_mm.quantize(model, dict(base='w4a4', calibration=calibration, weight=dict(ptq='minmax')))
    gplq_mm.calibrate(model, x.split(2))
    gplq_mm.quantize_weights(model)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(gplq_mm.deploy(model)(x), expected)


@pytest.mark.parametrize('name', ['timm vit', 'timm swin', 'torchvision swin v2'])
def test_it_trains_alike_with_both_engines(name: str) -> None:
    model, x = plain_model(name), images(name)
    load_adapters_of(model)

    def run(network: nn.Module, x: Any) -> Any:
        return network(x)

    assert_engines_agree(converted(model, x, run), x, run)


def test_the_layers_that_give_the_scores_keep_eight_bits() -> None:
    for name, heads in (
        ('timm deit distilled', ['head', 'head_dist']),
        ('timm swin', ['head.fc']),
        ('torchvision vit', ['heads.head']),
        ('torchvision swin', ['head']),
    ):
        model = plain_model(name)
        gplq_mm.quantize(model)
        found = {n: q for n, q in quantizers(model).items() if q.role == 'predictor'}
        assert sorted({n.rpartition('.')[0] for n in found}) == heads
        assert {q.spec.num_bits for q in found.values()} == {8}


def test_a_distilled_deit_learns_both_features_of_its_teacher() -> None:
    model = plain_model('timm deit distilled')
    teacher = copy.deepcopy(model)
    gplq_mm.quantize(model, W8A8)
    gplq_mm.calibrate(model, images('timm deit distilled', 4).split(2))
    mimic = gplq_mm.distill(model, teacher)
    mimic(images('timm deit distilled')).backward()
    assert model.head_dist.weight.grad.abs().sum() > 0
    assert len(mimic._score_layers) == 2


def test_masks_of_vit_attention() -> None:
    model = plain_model('timm vit')
    attention = model.blocks[0].attn
    quantized = copy.deepcopy(attention)
    load_adapters_of(model)
    convert_(quantized, dict(scope='all'))
    set_quantization(quantized, False)
    x = torch.randn(2, 5, 16)
    for options in (
        dict(is_causal=True),
        dict(attn_mask=torch.randn(5, 5)),
        dict(attn_mask=torch.rand(5, 5) > 0.3 + torch.eye(5)),
    ):
        assert torch.equal(quantized(x, **options), attention(x, **options))


LOADED = """
import sys
import gplq_mm
from tests.helpers.plain_vit import plain_vit
gplq_mm.quantize(plain_vit())
print(*sorted({'timm', 'torchvision', 'mmengine'} & set(sys.modules)), 'end')
"""


def test_a_plain_model_imports_no_library() -> None:
    command = [sys.executable, '-W', 'ignore', '-c', LOADED]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ['end']


if __name__ == '__main__':
    lines = [f'  {json.dumps(name)}: {json.dumps(measure(name))}' for name in MODELS]
    TABLE.write_text('{\n' + ',\n'.join(lines) + '\n}\n', encoding='utf-8')
