# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Fine-tuning after rounding: what learns, what stays, and equality of ranks and resumed runs."""

import copy
import socket
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gplq_mm.analysis.start_error import as_float_model
from gplq_mm.calibration.activation_ranges import calibrate_activations
from gplq_mm.convert import convert_, quantized_layers, resolve_recipe
from gplq_mm.ptq import build_weight_ptq
from gplq_mm.ptq.corrections.finetune import learning_rate, vectors_of
from gplq_mm.ptq.stage2 import run_stage2
from tests.helpers.tiny_blocks import (
    BlockStack,
    images,
    is_on_grid,
    ptq_on_rank,
    ptq_state,
    run_pass,
    stage1_stack,
)

TUNED = ['gptq', dict(type='finetune', lr=0.01, epochs=3, batches=2)]


def recipe_with(ptq: Any) -> dict[str, Any]:
    return resolve_recipe(dict(base='w3a3', scope='all', weight=dict(ptq=ptq)))


def error(model: nn.Module, wanted: nn.Module, data: torch.Tensor) -> float:
    """Relative squared error of the outputs."""
    with torch.no_grad():
        pairs = [(model(x), wanted(x)) for x in data]
    return float(sum((a - b).square().sum() for a, b in pairs)) / float(
        sum(b.square().sum() for _, b in pairs)
    )


def float_and_stage1() -> tuple[nn.Module, nn.Module, Any]:
    torch.manual_seed(0)
    teacher = BlockStack().eval()
    model = copy.deepcopy(teacher)
    convert_(model, dict(base='w3a3', scope='all'))
    run = run_pass(model, images(32))
    calibrate_activations(model, run)
    for block in model.layers:  # something that these parameters can correct
        block.ln1.weight.data.mul_(1.3)
        block.ffn[2].bias.data.add_(0.2)
    return teacher, model, run


def test_the_float_features_are_approached_and_the_codes_stay() -> None:
    teacher, model, run = float_and_stage1()
    rounded = copy.deepcopy(model)
    run_stage2(rounded, recipe_with('gptq'), run_pass(rounded, images(32)))
    opened = partial(as_float_model, model, teacher.state_dict())
    result = run_stage2(model, recipe_with(TUNED), run, float_model=opened)
    assert result.notes == []
    unseen = images(32, seed=7)
    assert error(model, teacher, unseen) < 0.7 * error(rounded, teacher, unseen)
    plain = dict(quantized_layers(rounded))
    for name, layer in quantized_layers(model).items():
        assert is_on_grid(layer)
        assert torch.equal(layer.weight, plain[name].weight)
    moved = {
        n
        for n, p in vectors_of(model, plain).items()
        if not torch.equal(p, rounded.get_parameter(n))
    }
    assert {'layers.0.ln1.weight', 'layers.0.ln1.bias', 'stem.bias', 'head.bias'} <= moved


def test_it_goes_over_the_images_that_it_asks_for() -> None:
    teacher, model, run = float_and_stage1()
    asked: list[int] = []

    def more_images(number: int) -> Any:
        asked.append(number)
        return run_pass(model, images(number, seed=3))

    ptq = ['mse', dict(type='finetune', num_images=24, lr=0.01)]
    opened = partial(as_float_model, model, teacher.state_dict())
    run_stage2(model, recipe_with(ptq), run, float_model=opened, more_images=more_images)
    assert asked == [24]


def test_without_a_float_model_it_says_what_it_aims_at() -> None:
    model, _ = stage1_stack(bits=2)
    stage1, rounded = copy.deepcopy(model), copy.deepcopy(model)
    run_stage2(rounded, recipe_with('minmax'), None)
    ptq = ['minmax', dict(type='finetune', lr=0.01, epochs=4)]
    data = images(64, seed=3)
    notes = run_stage2(model, recipe_with(ptq), run_pass(model, data)).notes
    assert notes == ['finetune: there is no float model; its targets are the features of stage 1']
    assert error(model, stage1, data) < 0.95 * error(rounded, stage1, data)


def test_what_does_harm_is_undone() -> None:
    states = []
    for ptq in ('mse', ['mse', dict(type='finetune', lr=3.0)]):
        model, run = stage1_stack()
        notes = run_stage2(model, recipe_with(ptq), run).notes
        states.append(model.state_dict())
    assert notes[-1] == 'finetune: undone, since the feature error of held-out images did not fall'
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_one_batch_cannot_be_trained_on_and_held_out() -> None:
    model, _ = stage1_stack()
    rounded = copy.deepcopy(model)
    run_stage2(rounded, recipe_with('mse'), None)
    notes = run_stage2(model, recipe_with(['mse', 'finetune']), run_pass(model, images(1))).notes
    assert 'all images are one batch' in notes[-1] and 'skipped' in notes[-1]
    assert all(torch.equal(v, rounded.state_dict()[k]) for k, v in model.state_dict().items())


def test_two_ranks_give_the_bits_of_one(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(ptq_on_rank, (TUNED, 2, port, str(tmp_path)), nprocs=2)
    alone = ptq_state(TUNED, images(9))
    for rank in range(2):
        state = torch.load(tmp_path / f'{rank}.pt', weights_only=True)
        assert all(torch.equal(value, alone[key]) for key, value in state.items())


def test_a_finished_run_is_not_made_again(tmp_path: Path) -> None:
    first = ptq_state(TUNED, images(9), str(tmp_path))
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*.pt')}
    again = ptq_state(TUNED, images(9), str(tmp_path))
    assert files == {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*.pt')}
    assert all(torch.equal(value, again[key]) for key, value in first.items())


@pytest.mark.parametrize('name', ['lr', 'num_images', 'epochs', 'batches'])
def test_refuses_options_that_cannot_work(name: str) -> None:
    with pytest.raises(ValueError, match=f'{name}=0.*write positive numbers'):
        build_weight_ptq(['mse', {'type': 'finetune', name: 0}])


def test_the_learning_rate_rises_and_ends_low() -> None:
    rates = [learning_rate(step, 32) for step in range(32)]
    assert rates[0] < rates[1] < rates[2] and max(rates) == rates[2]
    assert rates[2:] == sorted(rates[2:], reverse=True) and rates[-1] < 0.01
