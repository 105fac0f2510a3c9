# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""With every quantizer off a converted module is the float module, bit for bit."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gplq_mm.convert import CoverageReport, convert_, quantizers, set_quantization
from gplq_mm.quantizers import PerRow
from tests.helpers.calibration import tensors

Run = Callable[[nn.Module, list[Tensor]], Any]


def forward_backward(
    model: nn.Module, inputs: list[Tensor], run: Run
) -> tuple[list[Tensor], list[Tensor | None], dict[str, Tensor | None]]:
    """Outputs, gradients of the inputs, gradients of the float parameters."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    model.zero_grad(set_to_none=True)
    torch.manual_seed(11)  # dropout
    outputs = tensors(run(model, inputs))
    generator = torch.Generator().manual_seed(5)
    loss = sum((y * torch.randn(y.shape, generator=generator)).sum() for y in outputs)
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if '_quantizer.' not in n}
    return outputs, [x.grad for x in inputs], grads


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal bits, or both absent."""
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def assert_identity(
    model: nn.Module, inputs: list[Tensor], run: Run, recipe: Any = 'w4a4'
) -> CoverageReport:
    """Forward and backward of the converted model, off, against the float model."""
    converted = copy.deepcopy(model)
    recipe = {'base': recipe, 'scope': 'all'} if isinstance(recipe, str) else recipe
    report = convert_(converted, recipe)
    assert_only_quantizer_keys(model, converted)
    assert isinstance(converted, type(model))
    set_quantization(converted, False)
    for mode in (True, False):
        model.train(mode)
        converted.train(mode)
        expected = forward_backward(model, inputs, run)
        actual = forward_backward(converted, inputs, run)
        assert len(expected[0]) == len(actual[0]) > 0
        assert all(map(same, expected[0], actual[0])), 'outputs differ'
        assert all(map(same, expected[1], actual[1])), 'gradients of the inputs differ'
        assert expected[2].keys() == actual[2].keys()
        wrong = [n for n in expected[2] if not same(expected[2][n], actual[2][n])]
        assert not wrong, f'gradients differ: {wrong}'
    return report


def assert_only_quantizer_keys(model: nn.Module, converted: nn.Module) -> None:
    """All float keys stay, only quantizer state is added, each tensor once."""
    before, after = model.state_dict(), converted.state_dict()
    assert set(before) <= set(after)
    added = set(after) - set(before)
    assert added and all('_quantizer.' in key for key in added)
    states = ['scale', 'zero_point', 'quant_range', 'calibrated']
    expected = []
    for name, q in quantizers(converted).items():
        own = ['row_axis'] * isinstance(q.spec.granularity, PerRow) + ['levels'] * q.spec.is_log
        expected += [f'{name}.{state}' for state in [*states, *own]]
    assert added == set(expected)
    assert len(added) == len(expected)
