# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The optimizer: weights and scales in groups of their own."""

import copy
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import MMLogger
from mmengine.optim import (
    AmpOptimWrapper,
    CosineAnnealingLR,
    LinearLR,
    OptimWrapper,
    build_optim_wrapper,
)
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import nn

from gplq_mm.convert import convert_
from gplq_mm.integrations.mm.optim import (
    GPLQOptimWrapperConstructor,
    shared_lr_warning,
    shorten_lr_,
    slow_average_warning,
)
from gplq_mm.recipe import as_recipe
from tests.helpers.models import Detector

OPTIM = dict(
    lr=1e-3,
    scale_lr=5e-3,
    weight_decay=0.02,
    scale_weight_decay=0.01,
    scale_step='absolute',  # relative steps refuse weight decay of scales
    vector_lr=None,
    betas=[0.8, 0.9],
)
CONSTRUCTOR = dict(constructor='gplq_mm.GPLQOptimWrapperConstructor')


@pytest.fixture
def model() -> Any:
    model: Any = Detector()
    recipe = as_recipe(dict(base='w4a4', scope='all', rules=[], optim=OPTIM))
    convert_(model, recipe)
    model.gplq = SimpleNamespace(recipe=recipe)
    return model


def change_optim(model: Any, **values: Any) -> None:
    recipe = model.gplq.recipe
    model.gplq.recipe = recipe.change(optim=recipe.optim.change(**values))


def build(model: Any, **options: Any) -> OptimWrapper:
    return build_optim_wrapper(model, ConfigDict(copy.deepcopy({**CONSTRUCTOR, **options})))


def names(model: nn.Module, group: dict[str, Any]) -> set[str]:
    wanted = {id(p) for p in group['params']}
    return {n for n, p in model.named_parameters() if id(p) in wanted}


def test_the_recipe_gives_two_groups(model: Any) -> None:
    wrapper = build(model)
    assert type(wrapper) is OptimWrapper
    assert isinstance(wrapper.optimizer, torch.optim.AdamW)
    weights, scales = wrapper.optimizer.param_groups
    everything = {n for n, _ in model.named_parameters()}
    assert names(model, scales) == {n for n in everything if n.endswith('_quantizer.scale')}
    assert names(model, weights) == everything - names(model, scales)
    assert (weights['lr'], weights['weight_decay']) == (1e-3, 0.02)
    assert (scales['lr'], scales['weight_decay']) == (pytest.approx(5e-3), 0.01)
    assert weights['betas'] == scales['betas'] == (0.8, 0.9)


@pytest.mark.parametrize('paramwise', [{}, {'custom_keys': {'backbone': {'lr_mult': 0.1}}}])
def test_biases_and_gains_take_steps_of_their_own(model: Any, paramwise: Any) -> None:
    change_optim(model, vector_lr=2e-3)
    wrapper = build(model, paramwise_cfg=paramwise)
    found = {n: g for g in wrapper.optimizer.param_groups for n in names(model, g)}
    vectors = {
        n for n, p in model.named_parameters() if p.dim() == 1 and '_quantizer.scale' not in n
    }
    assert any(n.endswith('bias') for n in vectors)
    assert {n for n, g in found.items() if g['lr'] == 2e-3} == vectors
    assert {found[n]['weight_decay'] for n in vectors} == {0.0}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    wrapper.optimizer.step()
    for n in vectors:
        bias = before[n]
        size = bias.square().mean().sqrt().clamp_min(1e-2) if n.endswith('bias') else bias.abs()
        moved = model.get_parameter(n).detach()
        torch.testing.assert_close(moved, bias - 2e-3 * size, rtol=1e-5, atol=1e-7)


def test_steps_of_their_own_keep_their_rate_beside_a_config_that_gives_one(model: Any) -> None:
    change_optim(model, vector_lr=2e-3)
    groups = build(model, optimizer=dict(type='SGD', lr=2e-3)).optimizer.param_groups
    assert [g['lr'] for g in groups] == pytest.approx([2e-3, 1e-2, 4e-3])
    assert shared_lr_warning(SimpleNamespace(optimizer=Mock(param_groups=groups)), model) is None


def test_the_configs_optimizer_wins_and_the_scales_keep_their_ratio(model: Any) -> None:
    optimizer = dict(type='SGD', lr=0.1, momentum=0.9)
    wrapper = build(model, optimizer=optimizer, clip_grad=dict(max_norm=1.0), accumulative_counts=2)
    assert isinstance(wrapper.optimizer, torch.optim.SGD)
    weights, scales = wrapper.optimizer.param_groups
    assert (weights['lr'], scales['lr']) == (0.1, pytest.approx(0.5))
    assert weights['momentum'] == 0.9
    assert wrapper.clip_grad_kwargs == dict(max_norm=1.0)


def test_an_optimizer_without_a_learning_rate_takes_the_recipes(model: Any) -> None:
    for options in (dict(), dict(paramwise_cfg=dict(bias_lr_mult=1.0))):
        wrapper = build(model, optimizer=dict(type='Adam'), **options)
        lrs = {round(g['lr'], 9) for g in wrapper.optimizer.param_groups}
        assert lrs == {1e-3, 5e-3}


def test_paramwise_settings_join_those_of_the_scales(model: Any) -> None:
    custom = dict(custom_keys={'backbone.attn': dict(lr_mult=0.1)}, bias_decay_mult=0.0)
    groups = build(model, paramwise_cfg=custom).optimizer.param_groups
    of = {n: g for g in groups for n in names(model, g)}
    scale = of['backbone.attn.qkv.input_quantizer.scale']
    assert scale['lr'] == pytest.approx(5e-3)
    assert scale['weight_decay'] == pytest.approx(0.01)
    assert of['backbone.attn.qkv.weight']['lr'] == pytest.approx(1e-4)
    assert of['neck.weight']['lr'] == 1e-3
    assert of['neck.bias']['weight_decay'] == 0.0


def test_a_longer_key_of_the_user_does_not_catch_the_scales(model: Any) -> None:
    custom = dict(custom_keys={'backbone.attn.qkv': dict(lr_mult=0.1, decay_mult=0.5)})
    groups = build(model, paramwise_cfg=custom).optimizer.param_groups
    of = {n: g for g in groups for n in names(model, g)}
    scale = of['backbone.attn.qkv.input_quantizer.scale']
    assert (scale['lr'], scale['weight_decay']) == (pytest.approx(5e-3), 0.01)
    assert of['backbone.attn.qkv.weight']['lr'] == pytest.approx(1e-4)


def test_accumulation_and_clipping_with_paramwise_settings(model: Any) -> None:
    options = dict(accumulative_counts=4, clip_grad=dict(max_norm=1.0))
    wrapper = build(model, paramwise_cfg=dict(norm_decay_mult=0.0), **options)
    assert wrapper._accumulative_counts == 4
    assert wrapper.clip_grad_kwargs == dict(max_norm=1.0)
    assert {g['lr'] for g in wrapper.optimizer.param_groups} == {1e-3, 5e-3}


def test_an_optimizer_of_mmengines_own_constructor_is_warned_of(model: Any) -> None:
    def warning(**options: Any) -> str | None:
        return shared_lr_warning(build_optim_wrapper(model, ConfigDict(options)), model)

    plain = dict(optimizer=dict(type='AdamW', lr=0.02))
    told = warning(**copy.deepcopy(plain))
    assert told is not None
    assert 'LR of the weights, [0.02]' in told
    assert 'scale_lr=0.005' in told
    assert CONSTRUCTOR['constructor'] in told
    assert warning(**CONSTRUCTOR, **copy.deepcopy(plain)) is None
    keys = {'_quantizer.scale': dict(lr_mult=5.0)}
    assert warning(**copy.deepcopy(plain), paramwise_cfg=dict(custom_keys=keys)) is None
    change_optim(model, scale_lr=model.gplq.recipe.optim.lr)
    assert warning(**plain) is None


def test_paramwise_scales_without_any_decay(model: Any) -> None:
    optimizer = dict(type='SGD', lr=0.1)
    groups = build(model, optimizer=optimizer, paramwise_cfg=dict(bias_lr_mult=2.0))
    of = {n: g for g in groups.optimizer.param_groups for n in names(model, g)}
    assert of['neck.input_quantizer.scale']['lr'] == pytest.approx(0.5)
    assert of['neck.bias']['lr'] == pytest.approx(0.2)


def test_a_users_own_key_for_the_scales_wins(model: Any) -> None:
    custom = dict(custom_keys={'_quantizer.scale': dict(lr_mult=3.0)})
    groups = build(model, paramwise_cfg=custom).optimizer.param_groups
    of = {n: g for g in groups for n in names(model, g)}
    assert of['neck.input_quantizer.scale']['lr'] == pytest.approx(3e-3)


def test_frozen_parameters_are_left_out(model: Any) -> None:
    model.backbone.requires_grad_(False)
    groups = build(model).optimizer.param_groups
    assert not [n for g in groups for n in names(model, g) if n.startswith('backbone')]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith('scale'))
    (only,) = build(model).optimizer.param_groups
    assert only['lr'] == pytest.approx(5e-3)


def test_amp_wraps_the_same_groups(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = 'mmengine.optim.optimizer.amp_optimizer_wrapper'
    monkeypatch.setattr(f'{module}.is_cuda_available', lambda: True)
    monkeypatch.setattr('gplq_mm.integrations.mm.cpu_amp.get_device', lambda: 'cuda')
    wrapper = build(model, type='AmpOptimWrapper', dtype='bfloat16')
    assert isinstance(wrapper, AmpOptimWrapper)
    lrs = [g['lr'] for g in wrapper.optimizer.param_groups]
    assert lrs == [1e-3, pytest.approx(5e-3)]


def test_auto_scale_lr_scales_both_groups(model: Any) -> None:
    wrapper = build(model)
    runner: Any = SimpleNamespace(
        _train_dataloader=dict(batch_size=4),
        _world_size=1,
        world_size=1,
        logger=MMLogger.get_current_instance(),
        param_schedulers=[],
    )
    Runner.scale_lr(runner, wrapper, dict(base_batch_size=16, enable=True))
    lrs = [g['lr'] for g in wrapper.optimizer.param_groups]
    assert lrs == [pytest.approx(2.5e-4), pytest.approx(1.25e-3)]


def short_run(model: Any, wrapper: OptimWrapper, iterations: int) -> tuple[str | None, list]:
    schedulers = [
        LinearLR(wrapper, start_factor=0.5, by_epoch=False, end=4),
        CosineAnnealingLR(wrapper, T_max=iterations - 4, by_epoch=False, begin=4, end=iterations),
    ]
    fields = dict(optim_wrapper=wrapper, param_schedulers=schedulers, max_iters=iterations)
    return shorten_lr_(SimpleNamespace(**fields), model), schedulers


def curve(wrapper: OptimWrapper, schedulers: list, steps: int) -> list[list[float]]:
    found = []
    for _ in range(steps):
        found.append([group['lr'] for group in wrapper.optimizer.param_groups])
        wrapper.optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    return found


@pytest.mark.parametrize('paramwise', [{}, dict(custom_keys={'roi_head': dict(lr_mult=0.1)})])
def test_few_iterations_take_smaller_steps_from_the_first_to_the_last(
    model: Any, paramwise: dict[str, Any]
) -> None:
    options = {'paramwise_cfg': paramwise} if paramwise else {}
    curves = {}
    for full in (0, 80):
        change_optim(model, lr_iterations=full)
        wrapper = build(model, **options)
        said, schedulers = short_run(model, wrapper, 20)
        assert (said is None) == (full == 0)
        curves[full] = curve(wrapper, schedulers, 20)
    assert '20 steps are fewer than 80' in said
    assert '0.0005 instead of 0.001' in said and said.endswith('train_cfg.max_iters=80')
    groups = wrapper.optimizer.param_groups
    of_scales = [all('_quantizer.scale' in n for n in names(model, g)) for g in groups]
    for long, short in zip(curves[0], curves[80], strict=True):
        for is_scale, a, b in zip(of_scales, long, short, strict=True):
            assert b == pytest.approx(a if is_scale else a / 2)


def test_a_short_run_is_told_how_many_epochs_would_do(model: Any) -> None:
    change_optim(model, lr_iterations=80)
    loop = Mock(spec=EpochBasedTrainLoop, max_epochs=2)
    runner = SimpleNamespace(
        optim_wrapper=build(model), param_schedulers=[], max_iters=18, _train_loop=loop
    )
    assert shorten_lr_(runner, model).endswith('write train_cfg.max_epochs=9')


def test_what_keeps_its_learning_rate_in_a_short_run(model: Any) -> None:
    change_optim(model, lr_iterations=80)
    assert short_run(model, build(model), 80)[0] is None
    assert short_run(model, build(model, accumulative_counts=4), 320)[0] is None
    assert short_run(model, build(model, accumulative_counts=4), 160)[0] is not None
    given = build(model, optimizer=dict(type='AdamW', lr=0.1))
    assert short_run(model, given, 20)[0] is None
    assert (
        short_run(
            model,
            build(
                model,
                constructor='DefaultOptimWrapperConstructor',
                optimizer=dict(type='SGD', lr=0.1),
            ),
            20,
        )[0]
        is None
    )


def test_a_float_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Detector was not built by type='gplq_mm\.GPLQ'"):
        GPLQOptimWrapperConstructor({})(Detector())


def test_an_average_that_stays_at_the_start_is_warned_of() -> None:
    def hook(**cfg: Any) -> Any:
        return SimpleNamespace(ema_cfg=dict(type='ExponentialMovingAverage', **cfg))

    assert slow_average_warning([SimpleNamespace()], 10) is None
    assert slow_average_warning([hook(momentum=1e-4)], 0) is None
    assert slow_average_warning([hook(momentum=0.01)], 1000) is None
    warning = slow_average_warning([SimpleNamespace(), hook(momentum=1e-4)], 1251)
    assert warning is not None and '88%' in warning and 'momentum=0.004' in warning
