# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Learned rounding: never worse than its start, exact roundings, resumable, the same on N ranks."""

import copy
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from gplq_mm.convert import quantized_layers, resolve_recipe
from gplq_mm.ptq import BRECQ, PTQTask
from gplq_mm.ptq.rounding.frozen_suffix import FrozenSuffix
from gplq_mm.ptq.rounding.soft_rounding import SoftRounding, only_trainable, soft_weights
from gplq_mm.ptq.stage2 import run_stage2
from gplq_mm.stream import Call, CallStore, find_units
from gplq_mm.stream.sampling import BatchSampler, join, mixed
from tests.helpers.tiny_blocks import images, is_on_grid, ptq_on_rank, ptq_state, stage1_stack

BRECQ_FEW = dict(type='brecq', steps=8, lr=0.05)
BRECQ_SUFFIX = dict(type='brecq', steps=6, lr=0.05, global_weight=0.5, global_batches=3)
GLOBAL_FEW = dict(type='global', steps=7, batches=4)
PER_TENSOR = dict(granularity='per_tensor')
"""Of the inputs, where a test counts in steps of the weight as it is stored."""


def quantize(model: nn.Module, run: Any, ptq: Any) -> Any:
    recipe = dict(base='w2a2', scope='all', weight=dict(ptq=ptq))
    return run_stage2(model, resolve_recipe(recipe), run)


def layer_error(model: nn.Module, name: str, weight: Tensor, inputs: Tensor) -> Tensor:
    """Squared output error of each channel of a linear layer on given codes."""
    layer = model.get_submodule(name)
    difference = (layer.weight - weight).detach().double()
    return (inputs.double() @ difference.T).square().sum(0)


def test_adaround_is_never_worse_than_rounding_on_its_own_objective() -> None:
    improved = []
    for bits, seed in ((2, 0), (2, 1), (3, 0)):
        model, _ = stage1_stack(bits, seed=seed, activation=PER_TENSOR)
        weight = model.stem.weight.detach().clone()
        codes = model.stem.input_quantizer.codes(images().flatten(0, 1))[0].flatten(0, 1).detach()
        errors = {}
        for ptq in ('mse', dict(type='adaround', steps=60)):
            tried = copy.deepcopy(model)
            quantize_copy(tried, ptq)
            errors[str(ptq)] = layer_error(tried, 'stem', weight, codes)
        nearest, learned = errors.values()
        assert (learned <= nearest * (1 + 1e-9)).all()
        improved.append(bool(learned.sum() < 0.999 * nearest.sum()))
    assert any(improved)


def quantize_copy(model: nn.Module, ptq: Any) -> Any:
    def run() -> None:
        with torch.no_grad():
            for image in images():
                model(image)

    return quantize(model, run, ptq)


def test_a_layer_with_one_weight_a_row_is_rounded_to_the_best_of_the_two_codes() -> None:
    """AdaRound against all roundings of a row of six weights."""
    model, run = stage1_stack(3, seed=2)
    weight = model.stem.weight.detach().clone()
    codes = model.stem.input_quantizer.codes(images().flatten(0, 1))[0].flatten(0, 1).double()
    quantize(model, run, dict(type='adaround', steps=100))
    scale = model.stem.weight_quantizer.scale.double()
    base = torch.floor(weight.double() / scale[:, None])
    ups = torch.cartesian_prod(*[torch.arange(2.0)] * 8).double()  # (256, 8)
    gram = codes.T @ codes
    for row in range(len(weight)):
        rounded = (base[row] + ups).clamp(-4, 3) * scale[row]
        difference = rounded - weight[row].double()
        errors = ((difference @ gram) * difference).sum(1)
        mine = (model.stem.weight[row] - weight[row]).detach().double()
        found = mine @ gram @ mine
        assert found <= errors.quantile(0.05)  # among the best of all 256


def block_errors(model: nn.Module, float_model: nn.Module) -> list[Tensor]:
    """Output error of each block on the quantized model's inputs."""
    errors = []
    with torch.no_grad():
        x = model.stem(images().flatten(0, 1))
        for block, wanted in zip(model.layers, float_model.layers, strict=True):
            errors.append((block(x) - wanted(x)).square().mean())
            x = block(x)
    return errors


def test_brecq_is_not_worse_than_its_start_and_better_here() -> None:
    float_model, _ = stage1_stack(2, activation=PER_TENSOR)
    errors = {}
    for ptq in ('mse', dict(type='brecq', start='nearest', steps=40, lr=0.05)):
        model, run = stage1_stack(2, activation=PER_TENSOR)
        quantize(model, run, ptq)
        for layer in quantized_layers(model).values():
            assert is_on_grid(layer)
        errors[str(ptq)] = block_errors(model, float_model)[0]
    nearest, learned = errors.values()
    assert learned < nearest


@pytest.mark.parametrize('weight', [0.0, 0.5])
def test_a_harmful_optimisation_is_undone(weight: float) -> None:
    states = []
    harmful = dict(type='brecq', steps=1, lr=50.0, scale_lr=1.0, global_weight=weight)
    for ptq in ('gptq', ['gptq', harmful]):
        model, run = stage1_stack(2)
        quantize(model, run, ptq)
        states.append(model.state_dict())
    assert [n for n in states[0] if not torch.equal(states[0][n], states[1][n])] == []


def test_the_global_term_has_the_gradients_of_all_images_at_once() -> None:
    """Against plain autograd on the whole model: feature before the head, and its output."""
    model, run = stage1_stack(3)
    layers = quantized_layers(model)
    units = find_units(model, layers, run)
    wanted = [w.detach() for w in head_calls(model)]
    weights = {n: nn.Parameter(la.weight.detach().clone()) for n, la in layers.items()}
    suffix = FrozenSuffix(PTQTask(model, layers, weights, run), units)
    assert suffix.batches == 8 and all(map(suffix.sees, units))
    with torch.no_grad():
        assert suffix.error() == 0
        for layer in layers.values():
            layer.weight += 0.05 * torch.randn(layer.weight.shape)
    learned = [model.layers[0].ffn[0].weight, model.head.bias]
    given = [torch.ones_like(p) for p in learned]
    for p, grad in zip(learned, given, strict=True):
        p.grad = grad.clone()
    suffix.add_gradients(learned, range(8), 3.0)
    parts = [
        (y - w).square().mean((1, 2)) / w.square().mean((1, 2))
        for y, w in zip(head_calls(model), wanted, strict=True)
    ]
    loss = torch.stack(parts).mean()
    assert suffix.error() == pytest.approx(loss.item(), rel=1e-5)
    found = torch.autograd.grad(3.0 * loss, learned)
    for p, grad, start in zip(learned, found, given, strict=True):
        assert p.grad is not None and grad.abs().max() > 0
        torch.testing.assert_close(p.grad - start, grad, rtol=1e-4, atol=1e-6)


def head_calls(model: nn.Module) -> list[Tensor]:
    """What the head gets and gives for all images, ``(images, tokens, channels)`` each."""
    seen: list[Tensor] = []
    handle = model.head.register_forward_hook(lambda _, args, y: seen.extend((*args, y)))
    model(images().flatten(0, 1))
    handle.remove()
    return seen


def test_the_global_term_brings_the_output_closer_to_stage_1() -> None:
    """On the mean of four models; a single one may end in another minimum."""
    errors = {0.0: 0.0, 2.0: 0.0}
    for seed in range(4):
        wanted = features(stage1_stack(2, seed=seed)[0])
        for weight in errors:
            model, run = stage1_stack(2, seed=seed)
            ptq = dict(type='brecq', steps=40, global_weight=weight, global_batches=4)
            assert quantize(model, run, ['gptq', ptq]).notes == []
            power = wanted.square().mean()
            errors[weight] += float((features(model) - wanted).square().mean() / power)
    assert errors[2.0] < errors[0.0]


def features(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(images().flatten(0, 1))


def test_global_brings_the_output_closer_to_stage_1_and_keeps_the_grid() -> None:
    stage1, _ = stage1_stack(2)
    errors = {}
    for ptq in ('mse', ['mse', dict(type='global', steps=40, lr=0.05)]):
        model, run = stage1_stack(2)
        result = quantize(model, run, ptq)
        for layer in quantized_layers(model).values():
            assert is_on_grid(layer)
        assert result.notes == []
        errors[str(ptq)] = (features(model) - features(stage1)).square().mean()
    plain, learned = errors.values()
    assert learned < 0.9 * plain


def test_global_that_does_harm_is_undone() -> None:
    states = []
    for ptq in ('mse', ['mse', dict(type='global', steps=1, lr=50.0, scale_lr=2.0)]):
        model, run = stage1_stack(2)
        notes = quantize(model, run, ptq).notes
        states.append(model.state_dict())
    assert notes == ['global: undone, since the feature error did not fall']
    assert [n for n in states[0] if not torch.equal(states[0][n], states[1][n])] == []


def test_soft_weights_start_at_the_float_weights_or_at_the_codes_and_are_removed() -> None:
    model, run = stage1_stack(3, activation=PER_TENSOR)
    floats = {n: la.weight.detach().clone() for n, la in quantized_layers(model).items()}
    quantize(model, run, 'gptq')
    layer = model.layers[0].ffn[0]
    weight = floats['layers.0.ffn.0']
    step = layer.weight_quantizer.scale[:, None]
    held = SoftRounding(layer, weight, False, commitment=1.0)
    assert ((held.weight() - layer.weight).abs() <= 0.011 * step).all()
    free = SoftRounding(layer, weight, False, commitment=0.0)
    between = (weight >= free.base * step) & (weight <= torch.clamp(free.base + 1, max=3) * step)
    assert between.float().mean() > 0.5
    assert ((free.weight() - weight).abs() <= 0.011 * step)[between].all()
    before = layer.weight.detach().clone()
    held.write()
    assert torch.equal(layer.weight, before)
    x = torch.randn(2, 6)
    with soft_weights([free]), only_trainable(model, []):
        layer(x).sum().backward()
        assert free.v.grad is not None and free.v.grad.abs().sum() > 0
        assert all(p.grad is None for p in model.parameters())
    assert 'effective_weight' not in vars(layer)
    assert layer.weight.requires_grad


def test_batches_hold_calls_that_fit_and_stay_small() -> None:
    store = CallStore(1 << 20)
    for index in range(10):
        store.append(Call((torch.full((1, 4 + index % 2), float(index)),), {'hw': (1, 2)}))
    generator = torch.Generator().manual_seed(0)
    sampler = BatchSampler(store, 8, 13, generator)
    drawn = [sampler.draw() for _ in range(60)]
    assert {len(d) for d in drawn} == {3, 2}
    assert all(len({i % 2 for i in d}) == 1 and len(set(d)) == len(d) for d in drawn)
    joined = join([store[i] for i in drawn[0]])
    assert joined.kwargs == {'hw': (1, 2)} and len(joined.args[0]) == len(drawn[0])
    zeros, ones = Call((torch.zeros(100, 100),)), Call((torch.ones(100, 100),))
    share = mixed(zeros, ones, 0.25, generator).args[0].mean()
    assert share == pytest.approx(0.25, abs=0.02)


def test_a_tensor_that_all_calls_share_is_not_joined() -> None:
    """BEiT's blocks get one relative position bias beside the tokens of each image."""
    store, shared = CallStore(1 << 20), torch.randn(3, 4, 4)
    for index in range(6):
        own = shared if index < 4 else shared + 1
        store.append(Call((torch.full((1, 4), float(index)),), {'bias': own}))
    sampler = BatchSampler(store, 8, 1000, torch.Generator().manual_seed(0))
    assert sampler.groups == [[0, 1, 2, 3], [4, 5]]
    joined = join([store[i] for i in (2, 0, 3)])
    assert joined.args[0][:, 0].tolist() == [2, 0, 3]
    assert torch.equal(joined.kwargs['bias'], shared)


def test_global_trains_through_a_model_that_checkpoints_activations() -> None:
    model, run = stage1_stack(2)
    block = model.layers[0]
    block.with_cp, plain = True, type(block).forward

    class Checkpointing(type(block)):  # type: ignore[misc]
        def forward(self, x: Tensor, hw_shape: Any = None) -> Tensor:
            if self.with_cp and x.requires_grad:
                return torch.utils.checkpoint.checkpoint(plain, self, x, use_reentrant=True)
            return plain(self, x)

    block.__class__ = Checkpointing
    quantize(model, run, ['mse', GLOBAL_FEW])
    assert block.with_cp is True
    reference, run = stage1_stack(2)
    quantize(reference, run, ['mse', GLOBAL_FEW])
    assert torch.equal(features(model), features(reference))


@pytest.mark.parametrize('ptq', [BRECQ_FEW, BRECQ_SUFFIX])
def test_killed_and_run_again_gives_the_bits_of_an_uninterrupted_run(
    ptq: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = ptq_state(ptq, images())
    original = BRECQ.quantize_unit

    def dies(self: BRECQ, task: Any, unit: Any, *args: Any) -> None:
        if unit.name == 'layers.1':
            raise KeyboardInterrupt
        original(self, task, unit, *args)

    monkeypatch.setattr(BRECQ, 'quantize_unit', dies)
    with pytest.raises(KeyboardInterrupt):
        ptq_state(ptq, images(), str(tmp_path))
    monkeypatch.setattr(BRECQ, 'quantize_unit', original)
    resumed = ptq_state(ptq, images(), str(tmp_path))
    assert [n for n in alone if not torch.equal(alone[n], resumed[n])] == []


def test_two_ranks_give_the_bits_of_one(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    ptq = ['repq', 'gptq', BRECQ_FEW, BRECQ_SUFFIX, GLOBAL_FEW, 'bias_correction', 'qwt_v2']
    torch.multiprocessing.spawn(ptq_on_rank, (ptq, 2, port, str(tmp_path)), nprocs=2)
    alone = ptq_state(ptq, images(9))
    for rank in range(2):
        state = torch.load(tmp_path / f'{rank}.pt', weights_only=True)
        assert [n for n in alone if not torch.equal(alone[n], state[n])] == []


@pytest.mark.parametrize(
    ('ptq', 'message'),
    [
        (dict(type='brecq', start='best'), "start='best'"),
        (dict(type='brecq', drop=2), 'a drop from 0 to 1'),
        (dict(type='brecq', global_weight=-1), 'a weight of at least 0'),
        (dict(type='global', batches=0), 'write positive numbers'),
        (dict(type='adaround', steps=0), 'write positive numbers'),
        (dict(type='adaround', range='hessian'), "range='hessian'"),
    ],
)
def test_wrong_options_are_refused(ptq: Any, message: str) -> None:
    model, run = stage1_stack()
    with pytest.raises(ValueError, match=message):
        quantize(model, run, ptq)
