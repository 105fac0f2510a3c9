# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""What every operation answers: its operands, their codes, its work, its reference."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gplq_mm.convert import convert_
from gplq_mm.ops import Attention, Engine, Operation, QuantMatMul, dispatch, operations
from gplq_mm.ops.attention.products import added
from gplq_mm.ops.feed_forward import TwoLayers
from gplq_mm.quantizers import FakeQuantizer, QuantSpec
from tests.helpers.layers import quantized
from tests.helpers.models import Detector
from tests.helpers.reference import calibrated


def matmul(*values: Tensor) -> QuantMatMul:
    return QuantMatMul(*(calibrated(FakeQuantizer(QuantSpec()), x) for x in values))


def layer(module: nn.Module, x: Tensor, **options: Any) -> Any:
    return quantized(module, x, **options)


def make(kind: str) -> tuple[Operation, list[Any], list[str]]:
    """Operation, inputs of its reference, names of its operands."""
    torch.manual_seed(0)
    tokens, maps = torch.randn(2, 5, 6), torch.randn(2, 6, 5, 5)
    layers = ['input', 'weight']
    if kind == 'linear':
        return layer(nn.Linear(6, 4), tokens, per_channel_input=True), [tokens, None], layers
    if kind == 'conv':
        made = layer(nn.Conv2d(6, 4, 3, 2, 1, groups=2), maps, per_channel_input=True)
        return made, [maps, None], layers
    if kind == 'transposed':
        made = layer(nn.ConvTranspose2d(6, 4, 2, 2, groups=2), maps)
        return made, [maps, None], layers
    q, k, v = torch.randn(2, 1, 5, 6), torch.randn(2, 1, 6, 7), torch.randn(2, 1, 7, 6)
    if kind == 'matmul':
        return matmul(q, k), [q, k], ['lhs', 'rhs']
    if kind == 'attention':
        products = matmul(q, k), matmul((q @ k).softmax(-1), v)
        names = ['query', 'key', 'probabilities', 'value']
        return Attention(*products, added), [q, k, v], names
    first = layer(nn.Linear(6, 8), tokens)
    act = nn.GELU()
    second = layer(nn.Linear(8, 6), act(first(tokens)))
    names = [f'{n}.{o}' for n in ('first', 'second') for o in layers]
    return TwoLayers(Engine(), first, act, [nn.Identity()], second), [tokens], names


KINDS = ['linear', 'conv', 'transposed', 'matmul', 'attention', 'ffn']


@pytest.mark.parametrize('kind', KINDS)
def test_operands_have_names_quantizers_roles_and_shapes(kind: str) -> None:
    operation, _, names = make(kind)
    operands = operation.operands()
    assert list(operands) == names
    assert [o.quantizer for o in operands.values()] == list(operation.quantizers)
    for name, operand in operands.items():
        assert (operand.kind == 'weight') == name.endswith('weight')
        assert (operand.shape is None) == (operand.kind == 'activation')
        assert operand.role == operand.quantizer.role
    assert operation.kind == ('conv' if kind == 'transposed' else kind)


@pytest.mark.parametrize('kind', KINDS)
def test_codes_times_scale_are_the_values_on_the_grid(kind: str) -> None:
    operation, inputs, names = make(kind)
    with torch.no_grad():
        found = operation.codes(*[x for x in inputs if x is not None])
        assert list(found) == names
        for name, operand in operation.operands().items():
            codes, scale = found[name]
            assert torch.equal(codes, codes.round())
            assert codes.abs().max() < 2**operand.quantizer.spec.num_bits
            values = codes * scale
            assert torch.equal(operand.quantizer(values), values)


@pytest.mark.parametrize('kind', ['linear', 'conv', 'transposed', 'ffn'])
def test_a_layer_gives_the_codes_of_its_weight_alone(kind: str) -> None:
    operation, _, _ = make(kind)
    alone = operation.codes() if kind != 'ffn' else operation.first.codes()  # type: ignore[attr-defined]
    assert list(alone) == ['weight']


@pytest.mark.parametrize('kind', KINDS)
def test_work_is_what_torch_counts(kind: str) -> None:
    operation, inputs, _ = make(kind)
    inputs = [x if x is None else x.requires_grad_() for x in inputs]
    with FlopCounterMode(display=False) as flops:
        out = operation.reference(*inputs)
    shapes = [x.shape for x in inputs if x is not None]
    assert operation.macs(shapes, out.shape) == flops.get_total_flops() // 2 > 0


@pytest.mark.parametrize('kind', KINDS)
def test_every_backend_gives_the_numbers_of_the_reference(kind: str) -> None:
    operation, inputs, _ = make(kind)
    operation.engine = Engine(ffn='recompute')
    inputs = [x if x is None else x.requires_grad_() for x in inputs]
    expected = operation.reference(*inputs)
    chosen = dispatch.choose(operation, *inputs)
    assert chosen is not None and chosen.backend == 'packed'
    assert torch.equal(chosen.compute(operation, *inputs), expected)
    with torch.no_grad():
        torch.testing.assert_close(dispatch.compute(operation, *inputs), expected)


def test_operations_of_a_model_in_its_order() -> None:
    model = Detector()
    convert_(model, dict(base='w4a4', scope='all'))
    names = ['backbone.patch_embed', 'backbone.attn.qkv', 'backbone.attn.proj']
    assert list(operations(model))[:3] == names
    assert all(isinstance(m, Operation) for m in operations(model).values())
    assert {m.kind for m in operations(model).values()} == {'linear', 'conv'}
