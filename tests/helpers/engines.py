# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The fused engine against the reference engine, on the same module."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gplq_mm.convert import convert_
from gplq_mm.ops import set_engine
from tests.helpers.calibration import calibrate_activations, tensors

Run = Callable[[nn.Module, Tensor], Any]


def converted(module: nn.Module, x: Tensor, run: Run, recipe: Any = 'w4a4') -> nn.Module:
    """``module`` converted, calibrated on ``x``, in training mode; changed in place."""
    recipe = {'base': recipe, 'scope': 'all'} if isinstance(recipe, str) else recipe
    convert_(module, recipe)
    module.eval()
    calibrate_activations(module, lambda: run(module, x))
    module.train()
    return module


def training_step(
    module: nn.Module, engine: Any, x: Tensor, run: Run
) -> tuple[list[Tensor], Tensor | None, dict[str, Tensor]]:
    """Outputs, gradient of the input, gradients of the parameters of a copy of ``module``."""
    module = copy.deepcopy(module)
    set_engine(module, engine)
    x = x.clone().requires_grad_()
    torch.manual_seed(3)  # dropout
    outputs = tensors(run(module, x))
    generator = torch.Generator(x.device).manual_seed(5)
    noise = [torch.randn(y.shape, generator=generator, device=x.device) for y in outputs]
    loss = sum((y * n).sum() for y, n in zip(outputs, noise, strict=True))
    loss.backward()
    grads = {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters()
    }
    return outputs, x.grad, grads


def assert_engines_agree(
    module: nn.Module, x: Tensor, run: Run, engine: Any = 'fused', scale_tolerance: float = 0.2
) -> None:
    """Outputs equal bit for bit, gradients up to rounding, scales' up to the residuals' error."""
    expected = training_step(module, 'reference', x, run)
    actual = training_step(module, engine, x, run)
    assert len(expected[0]) == len(actual[0]) > 0
    for a, b in zip(expected[0], actual[0], strict=True):
        assert torch.equal(a, b), f'outputs differ by up to {(a - b).abs().max()}'
    assert_close(actual[1], expected[1], 'input')
    assert expected[2].keys() == actual[2].keys()
    of_scales = [n for n in expected[2] if n.endswith('.scale')]
    for name in expected[2].keys() - set(of_scales):
        assert_close(actual[2][name], expected[2][name], name)
    a, b = (torch.cat([g[2][n].flatten() for n in of_scales]) for g in (expected, actual))
    assert (a - b).norm() <= scale_tolerance * a.norm(), 'gradients of the scales differ'


def assert_close(actual: Tensor, expected: Tensor, name: str) -> None:
    """Equal up to the order of a sum."""
    tolerance = 1e-4 * float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(
        actual, expected, rtol=1e-3, atol=tolerance + 1e-6, msg=lambda m: f'{name}: {m}'
    )
