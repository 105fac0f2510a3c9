# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import gplq_mm
from gplq_mm.ops import Attention, QuantMatMul, dispatch, explain, set_engine, unregister_backend
from gplq_mm.ops.attention.products import added
from gplq_mm.ops.feed_forward import TwoLayers
from gplq_mm.ops.float_matmul import FloatMatMul
from gplq_mm.quantizers import FakeQuantizer, QuantSpec, build_observer
from gplq_mm.quantizers.packing import cpu_kernels
from tests.helpers.extending import example
from tests.helpers.layers import quantized

PACKAGE = Path(gplq_mm.__file__).parent
MOST_FILES = 5
"""Files of the package that one call of a linear layer may pass through."""
MOST_FILES_ON_GRID = 6
"""The same where stage 1 trains the weight on its grid: two tensors are quantized, one packed."""


def layer(**options: Any) -> Any:
    torch.manual_seed(0)
    linear = nn.Linear(6, 4)
    x = torch.randn(3, 6)
    made = quantized(linear, x, learn=True, **options)
    set_engine(made, 'fused')
    return made, x


def matmul() -> QuantMatMul:
    product = QuantMatMul(*(FakeQuantizer(QuantSpec()) for _ in range(2)))
    for quantizer in product.quantizers:
        quantizer.set_qparams(torch.tensor(0.1), torch.tensor(0.0))
    set_engine(product, 'fused')
    return product


def backend(operation: Any, *inputs: Any) -> str:
    chosen = dispatch.choose(operation, *inputs)
    return 'reference' if chosen is None else chosen.backend


def test_a_layer_trains_packed_and_is_evaluated_exactly() -> None:
    made, x = layer()
    assert backend(made, x, None) == 'packed'
    assert explain(made, x, None) == (
        'linear: packed; not integer: gradients are enabled; not exact: gradients are enabled'
    )
    with torch.no_grad():
        assert backend(made, x, None) == 'exact'
        assert explain(made, x, None) == (
            'linear: exact; not packed: gradients are disabled; '
            "not integer: engine.inference='simulated'"
        )
    with torch.inference_mode():
        assert backend(made, x, None) == 'exact'


def test_the_reference_trains_where_the_engine_or_the_call_says_so() -> None:
    made, x = layer()
    for parameter in made.parameters():
        parameter.requires_grad_(False)
    assert 'no tensor needs a gradient' in explain(made, x, None)
    assert backend(made, x.clone().requires_grad_(), None) == 'packed'
    set_engine(made, 'reference')
    assert backend(made, x.clone().requires_grad_(), None) == 'reference'
    assert "not packed: engine='reference'" in explain(made, x, None)


def test_codes_are_used_only_with_all_operands_active_and_no_autocast() -> None:
    made, x = layer()
    with torch.no_grad():
        with torch.autocast('cpu', dtype=torch.bfloat16):
            assert 'not exact: autocast' in explain(made, x, None)
        made.weight_quantizer.reset()
        assert 'not exact: an operand is not quantized now' in explain(made, x, None)
    assert backend(made, x, None) == 'packed'  # the weight is saved as it is
    made.input_quantizer.name = 'fc.input_quantizer'
    made.input_quantizer.observer = build_observer(made.input_quantizer.spec)
    assert 'not packed: fc.input_quantizer is not quantized now' in explain(made, x, None)
    made.input_quantizer.observer, made.input_quantizer.enabled = None, False
    assert backend(made, x, None) == 'reference'


def test_products_and_logarithmic_codes() -> None:
    product, x = matmul(), torch.rand(2, 2)
    assert backend(product, x, x) == 'packed'
    with torch.no_grad():
        assert backend(product, x, x) == 'exact'
    product.lhs_quantizer.set_spec(QuantSpec(signed=False, codes='log2'))
    assert 'not packed: logarithmic codes' in explain(product, x, x)


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        (lambda a: None, ''),
        (lambda a: setattr(a, 'dropout', 0.5), 'attention weights are dropped'),
        (lambda a: setattr(a, 'dropout', nn.Dropout(0.5)), 'attention weights are dropped'),
        (lambda a: setattr(a, 'dropout', nn.Dropout(0.5).eval()), ''),
        (lambda a: setattr(a, 'pv_matmul', FloatMatMul()), 'a rule keeps a product float'),
    ],
)
def test_attention_is_one_operation_unless(change: Callable[[Any], None], reason: str) -> None:
    attention = Attention(matmul(), matmul(), added)
    change(attention)
    x = torch.rand(1, 1, 3, 3)
    expected = f'attention: reference; not packed: {reason}' if reason else 'attention: packed'
    assert explain(attention, x, x, x) == f'{expected}; not integer: gradients are enabled'
    with torch.no_grad():
        assert backend(attention, x, x, x) == 'reference'


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        (lambda n: None, ''),
        (lambda n: setattr(n, 'act', nn.Tanh()), 'not two linear layers'),
        (lambda n: setattr(n, 'first', nn.Linear(6, 6)), 'not two linear layers'),
        (lambda n: setattr(n, 'drops', [nn.Dropout(0.5)]), 'elements are dropped'),
        (lambda n: n.act.register_forward_hook(lambda *_: None), 'hooks watch'),
        (lambda n: setattr(n, 'engine', gplq_mm.ops.Engine()), "engine.ffn='layers'"),
        (lambda n: setattr(n.first.input_quantizer, 'enabled', False), 'is not quantized now'),
    ],
)
def test_a_feed_forward_network_is_one_operation_unless(
    change: Callable[[Any], Any], reason: str
) -> None:
    engine = gplq_mm.ops.resolve_engine(dict(ffn='recompute'))
    x = torch.randn(3, 6)
    first, second = (quantized(nn.Linear(6, 6), x) for _ in range(2))
    network = TwoLayers(engine, first, nn.GELU(), [nn.Identity()], second)
    change(network)
    assert reason in explain(network, x) and backend(network, x) == (
        'reference' if reason else 'packed'
    )
    with torch.no_grad():
        assert backend(network, x) == 'reference'


def test_a_backend_from_outside_takes_the_calls_it_accepts() -> None:
    made, x = layer()
    with example('integer_backend') as integer_backend:
        with torch.no_grad():
            assert explain(made, x, None).startswith('linear: int64; not packed')
            out = made(x)
            with torch.autocast('cpu', dtype=torch.bfloat16):
                assert 'not int64: autocast' in explain(made, x, None)
        assert backend(made, x, None) == 'packed'
        unregister_backend(integer_backend.NAME)
        with torch.no_grad():
            assert backend(made, x, None) == 'exact'
            assert torch.equal(made(x), out)


def files_crossed(call: Callable[[], Any]) -> set[str]:
    """Files of the package whose code a call runs, apart from names for torch's own functions."""
    seen: set[str] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE) and 'compat' not in path.parts:
            seen.add(path.relative_to(PACKAGE).as_posix())

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return seen


@pytest.mark.parametrize('per_channel_input', [False, True])
@pytest.mark.parametrize('passes', ['compiled', 'torch'])
@pytest.mark.parametrize('case', ['stage 1', 'weights on grid', 'evaluation', 'reference'])
def test_one_call_of_a_linear_layer_passes_few_files(
    case: str, passes: str, per_channel_input: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if passes == 'torch':
        monkeypatch.setattr(cpu_kernels, 'load', lambda: (None, ''))
    elif cpu_kernels.load()[0] is None:
        pytest.skip(cpu_kernels.load()[1])
    made, x = layer(per_channel_input=per_channel_input)
    if case in ('stage 1', 'reference'):
        made.weight_quantizer.reset()  # float weights
    set_engine(made, 'reference' if case == 'reference' else 'fused')
    with torch.set_grad_enabled(case != 'evaluation'):
        crossed = files_crossed(lambda: made(x))
        expected = {'evaluation': 'exact', 'reference': 'reference'}.get(case, 'packed')
        assert backend(made, x, None) == expected
    assert {'ops/linear.py', 'ops/dispatch.py'} < crossed
    most = MOST_FILES_ON_GRID if case == 'weights on grid' else MOST_FILES
    assert len(crossed) <= most, sorted(crossed)


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="a backend 'exact' computes linear already"):
        dispatch.register_backend('exact', 'inference', ['linear'], lambda *_: '', lambda *_: None)
