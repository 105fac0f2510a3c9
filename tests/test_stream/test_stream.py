# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Units of a model and their inputs: those of the whole model, one unit at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gplq_mm.convert import quantized_layers, resolve_recipe
from gplq_mm.ptq.stage2 import run_stage2
from gplq_mm.stream import Call, CallStore, UnitStream, find_units, intercepted
from tests.helpers.tiny_blocks import BlockStack, images, is_on_grid, stage1_stack


def counted(run: Any) -> tuple[Any, list[int]]:
    """The pass, and a list that grows with each of its calls."""
    passes: list[int] = []

    def counting() -> None:
        passes.append(1)
        run()

    return counting, passes


def seen_inputs(model: nn.Module, name: str, run: Any) -> list[Tensor]:
    """What a module gets as first argument, by a plain hook on the whole model."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].clone())
    )
    run()
    handle.remove()
    return seen


def test_units_are_blocks_and_what_is_around_them_in_order() -> None:
    model, run = stage1_stack()
    units = find_units(model, quantized_layers(model), run)
    assert [u.name for u in units] == ['stem', 'layers.0', 'layers.1', 'head']
    assert list(units[1].layers) == [f'layers.0.{n}' for n in ('attn.proj', 'ffn.0', 'ffn.2')]
    assert {n for u in units for n in u.layers} == set(quantized_layers(model))


def test_inputs_are_those_of_the_whole_model_though_it_runs_only_twice() -> None:
    model, run = stage1_stack()
    counting, passes = counted(run)
    units = find_units(model, quantized_layers(model), run)
    stream = UnitStream(model, units, counting)
    for index, unit in enumerate(units[:3]):
        got = [call.args[0] for call in stream.inputs(index)]
        expected = seen_inputs(model, unit.name, run)
        assert len(got) == len(expected) == 8
        assert all(map(torch.equal, got, expected))
        with torch.no_grad():  # what follows must see the change
            for layer in unit.layers.values():
                layer.weight.mul_(0.75)
    assert stream.inputs(2)[0].kwargs == {'hw_shape': (1, 9)}
    assert len(passes) == 1  # stem, blocks: each takes the very output of the one before


def test_a_unit_may_be_left_out() -> None:
    model, run = stage1_stack()
    units = find_units(model, quantized_layers(model), run)
    stream = UnitStream(model, units, run)
    stream.inputs(0)
    got = [call.args[0] for call in stream.inputs(2)]
    assert all(map(torch.equal, got, seen_inputs(model, 'layers.1', run)))


def test_a_modified_output_is_not_taken_for_the_next_input() -> None:
    class Changed(BlockStack):
        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[0](self.stem(x))
            x.mul_(2)  # in place: the same tensor object, other values
            return self.layers[1](x)

    model, run = stage1_stack()
    model.__class__ = Changed
    units = find_units(model, quantized_layers(model), run)
    counting, passes = counted(run)
    stream = UnitStream(model, units, counting)
    for index, unit in enumerate(units):
        got = [call.args[0] for call in stream.inputs(index)]
        assert all(map(torch.equal, got, seen_inputs(model, unit.name, run)))
    assert len(passes) == 2


@pytest.mark.parametrize('budget', [0, 700, 1 << 20])
def test_calls_beyond_the_budget_lie_on_disk_and_come_back(budget: int, tmp_path: Any) -> None:
    folder = tmp_path / 'not' / 'yet'  # made when it is needed
    store = CallStore(budget, str(folder))
    calls = [
        Call((torch.randn(2, 5), [torch.arange(3), 'x']), {'hw': (1, 2), 'mask': torch.ones(2) > 0})
        for _ in range(12)
    ]
    for call in calls:
        store.append(call)
    assert store.bytes_in_memory <= budget
    assert bool(folder.is_dir() and list(folder.iterdir())) is (budget < 1000)
    for kept, call in zip(store, calls, strict=True):
        assert all(map(torch.equal, kept.tensors, call.tensors))
        assert kept.kwargs['hw'] == (1, 2) and kept.args[1][1] == 'x'
        kept.args[0].zero_()  # a copy: the store does not change
    assert torch.equal(store[3].args[0], calls[3].args[0])
    del store, kept
    assert not folder.is_dir() or not list(folder.iterdir())


def test_interception_restores_the_model_and_lets_inner_calls_through() -> None:
    class Two(nn.Module):
        def extract_feat(self, x: int) -> int:
            return x + 1

        def forward(self, x: int) -> int:
            return 2 * self.extract_feat(x)

    model, results = Two(), []
    with intercepted(model, lambda run: results.append(run())):
        assert model(1) is None
        assert model.extract_feat(5) is None
    assert results == [4, 6]
    assert 'forward' not in vars(model) and model(1) == 4


def test_a_layer_that_no_image_reaches_is_rounded_and_named() -> None:
    model, run = stage1_stack()
    model.spare = nn.Linear(4, 4)
    convertible, _ = stage1_stack(seed=3)
    model.spare = convertible.head
    recipe = resolve_recipe(dict(base='w3a3', scope='all', weight=dict(ptq='gptq')))
    result = run_stage2(model, recipe, run)
    assert result.notes == ['spare: no calibration image reaches it; rounded to nearest, mse range']
    assert model.spare.weight_quantizer.is_calibrated
    assert is_on_grid(model.spare)


def test_a_pass_that_calls_another_model_is_refused() -> None:
    model, _ = stage1_stack()
    other, run = stage1_stack()
    recipe = resolve_recipe(dict(base='w3a3', scope='all', weight=dict(ptq='gptq')))
    with pytest.raises(ValueError, match='reach no quantized layer'):
        run_stage2(model, recipe, run)
    assert images().shape[0] == 8 and other is not model
