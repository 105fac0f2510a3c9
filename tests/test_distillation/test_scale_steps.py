# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""A step of a learned scale is a factor, whatever the scale's size."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.optim import build_optim_wrapper
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from gplq_mm.convert import convert_, quantizers
from gplq_mm.distillation.scale_steps import ZERO_BIAS, ProportionalSteps, RelativeSteps
from gplq_mm.quantizers import FakeQuantizer, PerRow, PerTensor, QuantSpec
from gplq_mm.recipe import as_recipe
from tests.helpers.mm_models import calibrate_activations
from tests.helpers.models import Detector, image

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    'sgd': lambda p: SGD(p, lr=0.05),
    'momentum': lambda p: SGD(p, lr=0.05, momentum=0.9),
    'adam': lambda p: Adam(p, lr=0.02),
    'adamw': lambda p: AdamW(p, lr=0.02, weight_decay=0.3),
    'foreach': lambda p: AdamW(p, lr=0.02, foreach=True),
}


def parameters(values: list[Any]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor(v)) for v in values]


@pytest.mark.parametrize('make', OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_scales_of_all_sizes_move_by_equal_factors(make) -> None:
    start = [1e-4, 0.03, 1.0, 10.0]
    scales = parameters(start)
    optimizer = make(scales)
    RelativeSteps(optimizer, scales)
    target = 0.7
    for _ in range(5):
        optimizer.zero_grad()
        loss = sum(((s / s0).log() - target).square() for s, s0 in zip(scales, start, strict=True))
        loss.backward()
        optimizer.step()
    factors = torch.stack([s.detach() / s0 for s, s0 in zip(scales, start, strict=True)])
    torch.testing.assert_close(factors, factors[:1].expand(4), rtol=1e-5, atol=0)
    assert (factors > 1.05).all()


@pytest.mark.parametrize('lr', [1e-3, 0.1])
def test_a_first_step_of_adam_is_the_learning_rate_of_the_logarithm(lr) -> None:
    scales = parameters([1e-4, 10.0])
    optimizer = AdamW(scales, lr=lr, weight_decay=0.5)
    RelativeSteps(optimizer, scales)
    (scales[0] * 100 - scales[1]).backward()
    optimizer.step()
    factors = [scales[0].item() / 1e-4, scales[1].item() / 10]
    assert factors == pytest.approx([torch.tensor(-lr).exp().item(), torch.tensor(lr).exp().item()])


@pytest.mark.parametrize('make', OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_a_step_is_that_of_a_parameter_that_is_the_logarithm(make) -> None:
    scale, log = nn.Parameter(torch.tensor(0.02)), nn.Parameter(torch.tensor(0.02).log())
    optimizer = make([scale])
    RelativeSteps(optimizer, [scale])
    # a decay of the logarithm is what relative steps do not have
    is_adamw = isinstance(optimizer, AdamW)
    plain = AdamW([log], lr=0.02, weight_decay=0) if is_adamw else make([log])
    for _ in range(6):
        for value, opt in ((scale, optimizer), (log.exp(), plain)):
            opt.zero_grad()
            (value - 0.03).square().mul(1e3).backward()
            opt.step()
    torch.testing.assert_close(scale.detach(), log.detach().exp(), rtol=1e-4, atol=0)


def losses(unit: float, make: Callable[..., Optimizer], granularity: Any) -> list[float]:
    """Error of a learned scale on data in some unit, in units of the data's energy."""
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)) * unit
    quantizer = FakeQuantizer(QuantSpec(3, granularity=granularity, learn_scale=True))
    start = torch.tensor(0.3) if granularity == PerRow(-1) else torch.tensor(0.9 * unit)
    quantizer.set_qparams(start, torch.tensor(0.0))
    optimizer = make(list(quantizer.parameters()))
    RelativeSteps(optimizer, quantizer.parameters())
    found = []
    for _ in range(8):
        loss = (quantizer(x) - x).square().mean() / unit**2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize('granularity', [PerTensor(), PerRow(-1)])
@pytest.mark.parametrize('name', ['sgd', 'momentum', 'adamw'])
def test_the_loss_does_not_depend_on_the_unit(name, granularity) -> None:
    expected = losses(1.0, OPTIMIZERS[name], granularity)
    assert expected[-1] < expected[0]
    for unit in (2.0**-10, 2.0**10):  # powers of two: no other rounding
        found = losses(unit, OPTIMIZERS[name], granularity)
        assert found == pytest.approx(expected, rel=1e-4)


def test_other_parameters_step_as_without_it() -> None:
    found = []
    for relative in (False, True):
        weight, scale = parameters([0.5, 0.1])
        optimizer = AdamW([{'params': [weight]}, {'params': [scale]}], lr=0.1, weight_decay=0.1)
        if relative:
            RelativeSteps(optimizer, [scale])
        for _ in range(3):
            optimizer.zero_grad()
            (weight.square() + scale.detach()).backward()
            optimizer.step()
        found.append(weight.detach())
    assert torch.equal(*found)


@pytest.mark.parametrize('make', OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_a_scale_without_a_gradient_keeps_its_bits(make) -> None:
    used, unused = parameters([0.3, 1 / 3])
    optimizer = make([used, unused])
    RelativeSteps(optimizer, [used, unused])
    before = unused.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        used.square().backward()
        optimizer.step()
    assert torch.equal(unused.detach(), before) and used.item() < 0.3


def test_a_scale_stays_positive_whatever_the_gradient() -> None:
    scales = parameters([1e-4, 1.0])
    optimizer = SGD(scales, lr=1.0)
    RelativeSteps(optimizer, scales)
    for _ in range(3):
        for s in scales:
            s.grad = 5 / s.detach()
        optimizer.step()
    assert all(s.item() > 0 for s in scales)


def test_state_dicts_hold_the_scale_itself() -> None:
    quantizer = FakeQuantizer(QuantSpec(4, learn_scale=True))
    quantizer.set_qparams(torch.tensor(0.25), torch.tensor(0.0))
    optimizer = SGD(quantizer.parameters(), lr=0.1)
    RelativeSteps(optimizer, quantizer.parameters())
    keys = set(quantizer.state_dict())
    quantizer(torch.randn(64)).square().mean().backward()
    factor = (-0.1 * quantizer.scale.grad * 0.25).exp()
    optimizer.step()
    stored = quantizer.state_dict()
    assert set(stored) == keys
    torch.testing.assert_close(stored['scale'], 0.25 * factor)


def training(steps: int, optimizer_type: str, state: Any = None) -> dict[str, Any]:
    """Train a converted detector; what is needed to go on, and where it ended."""
    torch.manual_seed(0)
    model: Any = Detector()
    optim = dict(lr=1e-3, scale_lr=1e-2, vector_lr=1e-2, drop_rates='off')
    recipe = as_recipe(dict(base='w4a4', scope='all', optim=optim))
    convert_(model, recipe)
    calibrate_activations(model, lambda: model(image()))
    model.gplq = SimpleNamespace(recipe=recipe)
    config = dict(
        constructor='gplq_mm.GPLQOptimWrapperConstructor',
        optimizer=dict(type=optimizer_type, lr=0.1 if optimizer_type == 'SGD' else 1e-3),
    )
    wrapper = build_optim_wrapper(model, ConfigDict(config))
    if state is not None:
        model.load_state_dict(state['model'])
        wrapper.load_state_dict(state['optimizer'])
    for index in range(0 if state is None else state['done'], steps):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(index))
        wrapper.update_params(model(x).square().mean())
    optimizer = copy.deepcopy(wrapper.state_dict())
    return dict(model=copy.deepcopy(model.state_dict()), optimizer=optimizer, done=steps)


@pytest.mark.parametrize('optimizer_type', ['SGD', 'AdamW'])
def test_stopped_and_resumed_equals_uninterrupted(optimizer_type) -> None:
    whole = training(4, optimizer_type)
    resumed = training(4, optimizer_type, training(2, optimizer_type))
    assert whole['model'].keys() == resumed['model'].keys()
    assert all(torch.equal(v, resumed['model'][k]) for k, v in whole['model'].items())
    started = training(0, optimizer_type)['model']
    moved = [k for k in started if k.endswith('input_quantizer.scale')]
    assert moved and all(not torch.equal(started[k], whole['model'][k]) for k in moved)


@pytest.mark.parametrize(('scale_step', 'is_relative'), [('relative', True), ('absolute', False)])
def test_the_recipe_decides(scale_step, is_relative) -> None:
    model: Any = Detector()
    recipe = as_recipe(
        dict(
            base='w4a4',
            scope='all',
            optim=dict(lr=0.1, scale_lr=0.1, scale_step=scale_step, vector_lr=None),
        )
    )
    convert_(model, recipe)
    model.gplq = SimpleNamespace(recipe=recipe)
    config = dict(constructor='gplq_mm.GPLQOptimWrapperConstructor', optimizer=dict(type='SGD'))
    optimizer = build_optim_wrapper(model, ConfigDict(config)).optimizer
    scales: list[Tensor] = [q.scale for q in quantizers(model, 'activation').values()]
    with torch.no_grad():
        for s, factor in zip(scales, torch.linspace(0.5, 2, len(scales)), strict=True):
            s.mul_(factor)
    before = [s.detach().clone() for s in scales]
    for s in scales:
        s.grad = torch.ones_like(s)
    optimizer.step()
    for s, old in zip(scales, before, strict=True):
        lr = 0.1
        expected = old * (-lr * old).exp() if is_relative else old - lr
        torch.testing.assert_close(s.detach(), expected)


@pytest.mark.parametrize('make', OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_biases_and_gains_of_all_sizes_move_in_proportion(make) -> None:
    shape = torch.tensor([1.0, -2.0, 0.5])
    if make is OPTIMIZERS['adamw']:
        make = lambda p: AdamW(p, lr=0.02, weight_decay=0.0)  # noqa: E731
    moved = []
    for size in (0.1, 1.0, 1e3):
        bias, gain = nn.Parameter(shape * size), nn.Parameter(shape * size)
        optimizer = make([bias, gain])
        ProportionalSteps(optimizer, [bias], [gain])
        for _ in range(5):
            optimizer.zero_grad()
            sum((p / size - 3).square().sum() for p in (bias, gain)).backward()
            optimizer.step()
        moved.append(torch.stack([bias.detach(), gain.detach()]) / size)
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moved[2], moved[1], rtol=1e-5, atol=1e-5)
    assert ((moved[0] - shape).abs() > 1e-3).all()


def test_a_first_step_is_the_learning_rate_times_the_size() -> None:
    bias, gain, zeros = parameters([[3.0, -4.0], [3.0, -4.0], [0.0, 0.0]])
    optimizer = Adam([bias, gain, zeros], lr=0.01)
    ProportionalSteps(optimizer, [bias, zeros], [gain])
    (bias.sum() + gain.sum() + zeros.sum()).backward()
    optimizer.step()
    rms = 12.5**0.5
    torch.testing.assert_close(bias.detach(), torch.tensor([3 - 0.01 * rms, -4 - 0.01 * rms]))
    torch.testing.assert_close(gain.detach(), torch.tensor([3 - 0.03, -4 - 0.04]))
    torch.testing.assert_close(zeros.detach(), torch.full((2,), -0.01 * ZERO_BIAS))
