# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""`docs/extending.md`: its files are those of `examples/extending`, and they work from outside."""

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gplq_mm
from gplq_mm.convert import convert_, quantized_layers
from gplq_mm.ops import QuantMatMul, dispatch, operations
from tests.helpers.extending import EXAMPLES, example
from tests.helpers.identity import assert_identity
from tests.helpers.plain_vit import pixels, plain_vit
from tests.helpers.products import is_on_grid, record_products

ROOT = EXAMPLES.parents[1]
DOCUMENT = ROOT / 'docs' / 'extending.md'
FILES = sorted(EXAMPLES.rglob('*.py'))
MOST_LINES = 80
W8A8 = dict(base='w8a8', calibration=dict(migrate=False, compensate=False))


def blocks() -> list[tuple[str, str]]:
    """`(title, code)` of each Python block; the title is the file that it quotes, or empty."""
    quote = r'(?:^`examples/extending/([\w/]+\.py)`:\n\n)?^```python\n(.*?)^```$'
    return re.findall(quote, DOCUMENT.read_text(encoding='utf-8'), re.M | re.S)


def test_the_document_quotes_every_file_as_it_is() -> None:
    quoted = {title: code for title, code in blocks() if title}
    files = {p.relative_to(EXAMPLES).as_posix(): p.read_text(encoding='utf-8') for p in FILES}
    assert quoted == files


def test_the_commands_of_the_document_run() -> None:
    pytest.importorskip('timm')
    code = '\n'.join(code for title, code in blocks() if not title)
    path = os.pathsep.join([str(EXAMPLES), str(ROOT), os.environ.get('PYTHONPATH', '')])
    command = [sys.executable, '-W', 'ignore', '-c', code]
    environment = {**os.environ, 'PYTHONPATH': path}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('linear: int64; not packed')


@pytest.mark.parametrize('path', FILES, ids=lambda p: p.relative_to(EXAMPLES).as_posix())
def test_an_example_is_short_and_uses_public_names_alone(path: Path) -> None:
    text = path.read_text(encoding='utf-8')
    assert len(text.splitlines()) <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('gplq_mm'):
            assert re.fullmatch(r'gplq_mm\.\w+', node.module), f'not a room: {node.module}'
            public = set(importlib.import_module(node.module).__all__)
            assert {name.name for name in node.names} <= public


def attention_pool(**options: Any) -> nn.Module:
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    pool = timm.layers.AttentionPoolLatent(16, num_heads=2, **options)
    for parameter in pool.parameters():
        nn.init.normal_(parameter, std=0.3)
    return pool


OPTIONS = [dict(), dict(latent_len=3, pool_type='avg', pos_embed='abs', feat_size=9, qk_norm=True)]


@pytest.mark.parametrize('options', OPTIONS)
def test_quantizers_off_is_the_float_attention(options: dict[str, Any]) -> None:
    pool, x = attention_pool(**options), torch.randn(2, 9, 16)
    mask = torch.rand(1, 9) > 0.3
    with example('attention_pool'):
        for run in (lambda m, x: m(x[0]), lambda m, x: m(x[0], mask)):
            report = assert_identity(pool, [x], run)
            assert report.quantized['matmul'] == ['qk_matmul', 'pv_matmul']
            assert not report.kept_float
    unknown = convert_(pool, dict(scope='all'))
    assert unknown.quantized['matmul'] == []
    assert 'unknown attention class AttentionPoolLatent' in unknown.kept_float[0][1]


@pytest.mark.parametrize('options', OPTIONS)
def test_quantized_attention_is_on_its_grid_and_near_the_float_one(options: dict[str, Any]) -> None:
    pool, x = attention_pool(**options).eval(), torch.randn(8, 9, 16)
    mask = torch.arange(9)[None] < 6

    def both(model: nn.Module) -> None:
        for part in x.split(2):
            model(part)
            model(part, mask)

    with torch.no_grad():
        expected = [pool(x), pool(x, mask)]
    with example('attention_pool'):
        gplq_mm.quantize(pool, W8A8, strict=True)
        gplq_mm.calibrate(pool, forward_loop=both)
        gplq_mm.quantize_weights(pool, forward_loop=both)
        with torch.no_grad(), record_products(pool) as recorder:
            actual = [pool(x), pool(x, mask)]
    for y, reference in zip(actual, expected, strict=True):
        assert 0 < (y - reference).norm() < 0.05 * reference.norm()
    assert not recorder.forbidden
    products = [p for p in recorder.products if p.module in ('qk_matmul', 'pv_matmul')]
    assert len(products) == 4
    for product in products:
        assert is_on_grid(product.lhs, 8, axis=-1, vectors=True)
        assert is_on_grid(product.rhs, 8, axis=-2, vectors=True)


def output_errors(model: nn.Module, weights: dict[str, Tensor], x: Tensor) -> dict[str, float]:
    """Relative squared error of each layer's output for its own inputs, against float weights."""
    errors = {}

    def measure(name: str, layer: Any, inputs: tuple[Tensor, ...]) -> None:
        q = layer.input_quantizer(inputs[0])
        target = layer.product(q, weights[name], None).double()
        error = layer.product(q, layer.effective_weight(), None).double() - target
        errors[name] = float(error.square().sum() / target.square().sum())

    for name, layer in quantized_layers(model).items():
        layer.register_forward_pre_hook(lambda m, a, name=name: measure(name, m, a))
    with torch.no_grad():
        model.eval()(x)
    return errors


def quantized_by(ptq: Any, x: Tensor) -> tuple[nn.Module, dict[str, Tensor]]:
    """A quantized model, and its weights before stage 2."""
    model = plain_vit()
    gplq_mm.quantize(model, dict(base='w3a3', weight=dict(ptq=ptq)))
    gplq_mm.calibrate(model, x.split(8))
    weights = {n: m.weight.detach().clone() for n, m in quantized_layers(model).items()}
    gplq_mm.quantize_weights(model, x.split(8))
    return model, weights


def test_the_weight_algorithm_lowers_the_output_error_of_every_layer() -> None:
    x = pixels(32)
    nearest = output_errors(*quantized_by('mse', x), x)
    with example('quantease'):
        model, weights = quantized_by('quantease', x)
        again, _ = quantized_by('quantease', x)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    for name, layer in quantized_layers(model).items():
        assert torch.equal(layer.effective_weight(), layer.weight), f'{name} is not on its grid'
    errors = output_errors(model, weights, x)
    inside = [name for name in errors if name != 'patch_embed']  # eight bits: nearly no error
    assert len(inside) == 13
    for name in inside:
        assert errors[name] < 0.8 * nearest[name], name


def test_a_wrong_option_of_the_algorithm_is_refused_when_the_model_is_built() -> None:
    with example('quantease'), pytest.raises(ValueError, match='write a positive integer'):
        gplq_mm.quantize(plain_vit(), dict(weight=dict(ptq=dict(type='quantease', sweeps=0))))


def test_the_backend_computes_the_same_bits_and_exports_what_it_multiplies() -> None:
    x = pixels(8)
    model, _ = quantized_by('mse', x)
    with torch.no_grad():
        expected = model.eval()(x)
        with example('integer_backend') as integer_backend:
            taken = chosen_backends(model, x)
            assert set(taken.values()) == {'int64', 'exact'}
            assert [n for n, b in taken.items() if b == 'exact'] == ['patch_embed']
            assert sum(isinstance(operations(model)[n], QuantMatMul) for n in taken) == 4
            assert torch.equal(model(x), expected)
            tensors = integer_backend.export(model)
    for name, layer in quantized_layers(model).items():
        codes, scale = (tensors[f'{name}.weight.{part}'] for part in ('codes', 'scale'))
        assert torch.equal(codes * scale, layer.weight_quantizer(layer.folded_weight()))
        assert torch.equal(tensors[f'{name}.input.scale'], layer.input_quantizer.scale)


def chosen_backends(model: nn.Module, x: Tensor) -> dict[str, str]:
    """Backend of each layer and product in a forward pass without gradients."""
    chosen = {}

    def note(name: str, operation: Any, inputs: tuple[Any, ...]) -> None:
        call = inputs if isinstance(operation, QuantMatMul) else (inputs[0], operation.bias)
        found = dispatch.choose(operation, *call)
        chosen[name] = 'reference' if found is None else found.backend

    handles = [
        module.register_forward_pre_hook(lambda m, a, name=name: note(name, m, a))
        for name, module in operations(model).items()
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return chosen
