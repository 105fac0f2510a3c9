# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""GPTQ against a direct implementation, its refusals, and equality of ranks and resumed runs."""

import copy
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gplq_mm.calibration.activation_ranges import calibrate_activations
from gplq_mm.calibration.float_weights import copy_weights
from gplq_mm.convert import convert_, quantized_layers, resolve_recipe
from gplq_mm.ptq import GPTQ, PTQTask
from gplq_mm.ptq.layer_matrix import CodeProducts
from gplq_mm.ptq.rounding.guidance import LOWEST, TokenWeights
from gplq_mm.ptq.rounding.stage1_target import Target, change
from gplq_mm.ptq.stage2 import run_stage2
from gplq_mm.stream import find_units
from tests.helpers.tiny_blocks import (
    images,
    is_on_grid,
    ptq_on_rank,
    ptq_state,
    run_pass,
    stage1_stack,
)

LAYERS = {
    'linear': (lambda: nn.Linear(6, 4), (2, 9, 6)),
    'conv': (lambda: nn.Conv2d(4, 5, 3, stride=2, padding=1), (2, 4, 9, 8)),
    'grouped': (lambda: nn.Conv2d(4, 6, (1, 3), groups=2, dilation=2), (2, 4, 7, 9)),
    'depthwise': (lambda: nn.Conv2d(4, 4, 3, groups=4, padding='same'), (1, 4, 6, 7)),
    'transposed': (lambda: nn.ConvTranspose2d(4, 3, 2, 2), (2, 4, 5, 6)),
    'grouped_transposed': (lambda: nn.ConvTranspose2d(4, 6, 2, 2, groups=2), (2, 4, 5, 6)),
}


def one_layer(kind: str, granularity: str = 'per_tensor', bits: int = 3) -> tuple[Any, Any, Tensor]:
    """A calibrated one-layer model, its pass, and the input codes of all images."""
    make, shape = LAYERS[kind]
    data = torch.randn(4, *shape)
    model = nn.Sequential(make()).eval()
    activation = dict(granularity=granularity, num_bits=4)
    convert_(
        model, dict(base='w3a3', scope='all', weight=dict(num_bits=bits), activation=activation)
    )
    run = run_pass(model, data)
    calibrate_activations(model, run)
    return model, run, model[0].input_quantizer.codes(data.flatten(0, 1))[0].detach()


def quantize(model: nn.Module, run: Any, **options: Any) -> Any:
    recipe = dict(base='w3a3', scope='all', weight=dict(ptq=dict(type='gptq', **options)))
    return run_stage2(model, resolve_recipe(recipe), run)


def dense_problem(layer: Any, codes: Tensor, weight: Tensor) -> list[tuple[np.ndarray, ...]]:
    """For each group: rows of weights, columns x tokens of inputs, scale of each row."""
    scale = layer.weight_quantizer.scale.double()
    groups = getattr(layer, 'groups', 1)
    weight, codes = weight.double(), codes.double()
    if isinstance(layer, nn.Linear):
        return [(weight.numpy(), codes.flatten(0, -2).T.numpy(), scale.numpy())]
    parts = []
    for g, x in enumerate(codes.chunk(groups, 1)):
        if isinstance(layer, nn.ConvTranspose2d):
            w = weight.chunk(groups, 0)[g].permute(1, 2, 3, 0).flatten(0, 2)
            parts.append((w, x.permute(1, 0, 2, 3).flatten(1), scale.repeat_interleave(4)))
            continue
        w = weight.chunk(groups, 0)[g]
        left, right, top, bottom = layer._reversed_padding_repeated_twice
        cols = F.unfold(
            F.pad(x, (left, right, top, bottom)), layer.kernel_size, layer.dilation, 0, layer.stride
        )
        parts.append((w.flatten(1), cols.permute(1, 0, 2).flatten(1), scale.chunk(groups)[g]))
    return [tuple(t.numpy() for t in part) for part in parts]


def brain_surgeon(w: np.ndarray, x: np.ndarray, scale: np.ndarray, bits: int = 3) -> np.ndarray:
    """Codes by the textbook update: invert the Hessian of the columns that are left, each time."""
    hessian, low, high = x @ x.T, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    target, scale = w, np.broadcast_to(scale, len(w))
    nearest = np.clip(np.rint(w / scale[:, None]), low, high)
    mean = hessian.diagonal().mean()
    dead = np.flatnonzero(hessian.diagonal() == 0)
    hessian[dead, dead] = mean
    hessian += 0.01 * mean * np.eye(len(hessian))
    w, codes = w.copy(), np.zeros_like(w)
    for i in range(w.shape[1]):
        inverse = np.linalg.inv(hessian[i:, i:])
        codes[:, i] = np.clip(np.rint(w[:, i] / scale), low, high)
        error = (w[:, i] - codes[:, i] * scale) / inverse[0, 0]
        w[:, i:] -= error[:, None] * inverse[0][None]
    errors = [
        (((target - c * scale[:, None]) @ x) ** 2).sum(1, keepdims=True) for c in (codes, nearest)
    ]
    return np.where(errors[0] <= errors[1], codes, nearest)


@pytest.mark.parametrize('granularity', ['per_tensor', 'per_channel'])
@pytest.mark.parametrize('kind', LAYERS)
def test_codes_are_those_of_a_direct_dense_implementation(kind: str, granularity: str) -> None:
    model, run, codes = one_layer(kind, granularity)
    layer = model[0]
    folded = layer.folded_weight(layer.weight.detach().clone()).detach()
    quantize(model, run, act_order=False)
    ours = layer.weight_quantizer.codes(layer.folded_weight())[0].detach()
    expected = [brain_surgeon(*part) for part in dense_problem(layer, codes, folded)]
    got = [part[0] for part in dense_problem(layer, codes, ours)]
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize('act_order', [True, False])
@pytest.mark.parametrize('kind', LAYERS)
def test_the_output_error_is_below_that_of_rounding(kind: str, act_order: bool) -> None:
    model, run, codes = one_layer(kind, bits=2)
    nearest = copy.deepcopy(model)
    weight = model[0].weight.detach().clone()
    quantize(model, run, act_order=act_order)
    data = nearest[0].input_quantizer.scale * codes
    recipe = resolve_recipe(dict(base='w3a3', scope='all', weight=dict(ptq='mse')))
    run_stage2(nearest, recipe, None)
    wanted = nearest[0].product(data, weight, None)
    errors = [
        (la.product(data, la.weight, None) - wanted).square().sum() for la in (model[0], nearest[0])
    ]
    assert errors[0] <= errors[1] * (1 + 1e-6)


def test_wide_layers_are_solved_in_parts() -> None:
    model, run, codes = one_layer('linear')
    weight = model[0].weight.detach().clone()
    quantize(model, run, act_order=False, max_columns=4)
    layer = model[0]
    w, x, scale = dense_problem(layer, codes, weight)[0]
    halves = [brain_surgeon(w[:, p], x[p], scale) for p in (slice(0, 3), slice(3, 6))]
    ours = layer.weight_quantizer.codes(layer.weight)[0].detach().numpy()
    np.testing.assert_array_equal(ours, np.concatenate(halves, 1))


def test_asymmetric_target_is_the_least_squares_solution() -> None:
    rows, p, q = (torch.randn(1, n, k).double() for n, k in ((3, 5), (40, 5), (40, 5)))
    hessian, cross = q.transpose(1, 2) @ q, (p - q).transpose(1, 2) @ q
    got = (rows + change(rows, hessian, cross, damping=0.0))[0].T
    expected = np.linalg.lstsq(q[0].numpy(), (p[0] @ rows[0].T).numpy(), rcond=None)[0]
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9)


def two_halves(tokens: int, common: float) -> tuple[Tensor, Target]:
    """Rows, and the target of an input error that is ``common`` times the input beside noise."""
    rows, q = torch.randn(1, 3, 8).double(), torch.randn(2, 1, tokens, 8).double()
    error = common * q.roll(1, -1) + torch.randn_like(q)
    hessians = [x.transpose(1, 2) @ x for x in q]
    crosses = [e.transpose(1, 2) @ x for e, x in zip(error, q, strict=True)]
    return rows, Target(hessians, crosses)


def test_a_target_is_left_out_where_it_does_not_hold_on_other_images() -> None:
    """Chance correlations are not fitted; what holds on both halves is, whatever the noise."""
    rows, target = two_halves(tokens=10, common=0.0)
    assert target.gain(rows, 0.01) < 0
    assert (target.retargeted(rows, 0.01) - rows).abs().max() < 0.2 * rows.abs().max()
    rows, target = two_halves(tokens=2000, common=0.5)
    assert target.gain(rows, 0.01) > 0
    moved = target.retargeted(rows, 0.0) - rows
    torch.testing.assert_close(moved, 0.5 * rows.roll(-1, -1), atol=0.1, rtol=0.1)


def test_the_gain_of_a_target_is_the_error_that_it_saves_on_the_other_half() -> None:
    rows, q, error = (torch.randn(n, 1, k, 4).double() for n, k in ((1, 3), (2, 50), (2, 50)))
    error = error + 0.3 * q
    hessians = [x.transpose(1, 2) @ x for x in q]
    crosses = [e.transpose(1, 2) @ x for e, x in zip(error, q, strict=True)]
    saved = 0.0
    for fitted, other in ((0, 1), (1, 0)):
        moved = change(rows[0], hessians[fitted], crosses[fitted], 0.1)
        wanted = rows[0] @ error[other].transpose(1, 2)
        left = wanted - moved @ q[other].transpose(1, 2)
        saved += float(wanted.square().sum() - left.square().sum())
    assert Target(hessians, crosses).gain(rows[0], 0.1) == pytest.approx(saved, rel=1e-9)


def test_asymmetric_brings_the_output_closer() -> None:
    errors = {}
    for asymmetric in (False, True):
        model, run = stage1_stack(2, data=images(48))
        with torch.no_grad():
            wanted = model(images(48).flatten(0, 1))
            quantize(model, run, asymmetric=asymmetric)
            errors[asymmetric] = (model(images(48).flatten(0, 1)) - wanted).square().mean()
    assert errors[True] < errors[False]


@pytest.mark.parametrize('asymmetric', [True, False])
@pytest.mark.parametrize('damping', [0.0, 0.01])
def test_singular_hessian_dead_channels_and_zero_rows(damping: float, asymmetric: bool) -> None:
    """One image with three tokens, equal channels, channels that are always zero."""
    data = torch.randn(1, 1, 3, 8)
    data[..., 1], data[..., 2] = data[..., 0], 0
    model, run = stage1_stack(3, data=data)
    with torch.no_grad():
        model.stem.weight[1] = 0
        model.layers[0].ffn[0].weight.zero_()  # what follows gets constant inputs
    before = model.stem.weight[:, 2].detach().clone()
    result = quantize(model, run, damping=damping, asymmetric=asymmetric)
    for name, layer in quantized_layers(model).items():
        assert layer.weight.isfinite().all(), name
        assert is_on_grid(layer), name
    assert model.stem.weight[1].eq(0).all()
    step = model.stem.weight_quantizer.scale
    assert ((model.stem.weight[:, 2] - before).abs() <= 4 * step).all()
    assert result.notes == []


def test_overlapping_transposed_convolution_is_rounded_with_a_note() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 4, 3, 2)).eval()
    convert_(model, dict(base='w4a4', scope='all'))
    data = torch.randn(2, 1, 4, 5, 5)
    run = run_pass(model, data)
    calibrate_activations(model, run)
    result = quantize(model, run)
    assert result.notes == ['0: overlapping transposed convolution, rounded to nearest']
    assert model[0].weight_quantizer.is_calibrated


def test_the_scale_of_an_algorithm_before_is_kept() -> None:
    scales = {}
    for ptq in ('minmax', ['minmax', 'gptq'], 'gptq', dict(type='gptq', range='minmax')):
        model, run = stage1_stack()
        run_stage2(model, resolve_recipe(dict(base='w3a3', scope='all', weight=dict(ptq=ptq))), run)
        scales[str(ptq)] = model.layers[0].ffn[0].weight_quantizer.scale.clone()
    first, second, alone, option = scales.values()
    assert torch.equal(first, second) and torch.equal(first, option)
    assert not torch.equal(first, alone)


def test_killed_and_run_again_gives_the_bits_of_an_uninterrupted_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = ptq_state('gptq', images())
    quantized: list[str] = []
    original = GPTQ.quantize_unit

    def dies(self: GPTQ, task: Any, unit: Any, *args: Any) -> None:
        if unit.name == 'layers.1' and len(quantized) < 3:
            raise KeyboardInterrupt
        quantized.append(unit.name)
        original(self, task, unit, *args)

    monkeypatch.setattr(GPTQ, 'quantize_unit', dies)
    with pytest.raises(KeyboardInterrupt):
        ptq_state('gptq', images(), str(tmp_path))
    assert quantized == ['stem', 'layers.0']
    quantized.append('killed')
    resumed = ptq_state('gptq', images(), str(tmp_path))
    assert quantized == ['stem', 'layers.0', 'killed', 'layers.1', 'head']
    assert [n for n in alone if not torch.equal(alone[n], resumed[n])] == []
    ptq_state('gptq', images(seed=9), str(tmp_path))  # another model: nothing is taken over
    assert quantized[5:] == ['stem', 'layers.0', 'layers.1', 'head']


def test_two_ranks_give_the_bits_of_one(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(ptq_on_rank, ('gptq', 2, port, str(tmp_path)), nprocs=2)
    alone = ptq_state('gptq', images(9))
    for rank in range(2):
        state = torch.load(tmp_path / f'{rank}.pt', weights_only=True)
        assert [n for n in alone if not torch.equal(alone[n], state[n])] == []


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(range='msee'), "gptq range='msee': write one of"),
        (dict(damping=-1), 'damping of at least 0'),
        (dict(max_columns=0), 'at least one column'),
        (dict(order=True), 'does not take the options'),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    model, run = stage1_stack()
    with pytest.raises(ValueError, match=message):
        quantize(model, run, **options)


class FirstToken(nn.Module):
    """Only the first token reaches the head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[:, 0])


def first_token_model() -> tuple[Any, Any, Tensor]:
    torch.manual_seed(0)
    data = torch.randn(24, 1, 9, 6)
    data[:, :, 0] = data[:, :, 0] @ torch.randn(6, 6)  # another distribution than the rest
    model = FirstToken().eval()
    convert_(model, dict(base='w2a4', scope='all', activation=dict(granularity='per_tensor')))
    run = run_pass(model, data)
    calibrate_activations(model, run)
    return model, run, data


def test_guided_rounding_is_for_the_tokens_that_reach_the_features() -> None:
    errors = {}
    for guided in (0.0, 0.5, 1.0):
        model, run, data = first_token_model()
        with torch.no_grad():
            wanted = [model.body(x)[:, 0] for x in data]
            quantize(model, run, guided=guided)
            found = [model.body(x)[:, 0] for x in data]
        errors[guided] = float((torch.stack(found) - torch.stack(wanted)).square().sum())
    assert max(errors[1.0], errors[0.5]) < errors[0.0]


def test_weights_of_tokens_are_powers_of_two_and_zero_where_nothing_reaches_the_features() -> None:
    model, run, _ = first_token_model()
    layers = quantized_layers(model)
    task = PTQTask(model, layers, copy_weights(layers), run)
    with task.stage1():
        found = TokenWeights(task, find_units(model, layers, run), 0.5)
    levels = found.of_call('body', 3, 9)
    assert levels is not None and levels[1:].unique().tolist() == [LOWEST]
    assert -3 <= float(levels[0]) <= 0 and levels[0] == levels[0].round()
    assert found.of_call('body', 3, 10) is None and found.of_call('other', 0, 9) is None


@pytest.mark.parametrize('dtype_bits', [4, 8])
def test_weighted_products_are_exact_sums(dtype_bits: int) -> None:
    layer = one_layer('linear')[0][0]
    codes = torch.randint(-7, 8, (1, 50, 6)).float()
    other = torch.randint(-7, 8, (1, 50, 6)).float()
    levels = torch.randint(-dtype_bits, 1, (50,)).float()
    products = CodeProducts(layer, [(0, 4), (4, 6)], torch.device('cpu'))
    products.add(codes, other, levels)
    dense = (codes[0].double().T * levels.double().exp2()) @ other[0].double()
    for total, part in zip(products.sums, (slice(0, 4), slice(4, 6)), strict=True):
        assert torch.equal(total[0], dense[part, part])


def test_guided_two_ranks_give_the_bits_of_one(tmp_path: Path) -> None:
    ptq = dict(type='gptq', guided=0.5, asymmetric=True)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(ptq_on_rank, (ptq, 2, port, str(tmp_path)), nprocs=2)
    alone, plain = ptq_state(ptq, images(9)), ptq_state('gptq', images(9))
    for rank in range(2):
        state = torch.load(tmp_path / f'{rank}.pt', weights_only=True)
        assert all(torch.equal(value, alone[key]) for key, value in state.items())
    assert any(not torch.equal(value, alone[key]) for key, value in plain.items())


@pytest.mark.parametrize('guided', [-0.1, 1.5])
def test_a_power_out_of_range_is_refused(guided: float) -> None:
    with pytest.raises(ValueError, match='write a power from 0 to 1'):
        GPTQ(guided=guided)
