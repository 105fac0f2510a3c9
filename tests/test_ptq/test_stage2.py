# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import copy
import json
import logging
import math
import socket

import pytest
import torch
from torch import nn

from gplq_mm.calibration.activation_ranges import calibrate_trained_weights
from gplq_mm.convert import convert_, quantized_layers, resolve_recipe
from gplq_mm.ptq.stage2 import prepare_stage2, run_stage2
from gplq_mm.ptq.stage2_recipe import resolve_compensation
from gplq_mm.quantizers import UncalibratedError
from tests.helpers.tiny_blocks import (
    BlockStack,
    images,
    is_on_grid,
    stage1_stack,
    stage2_on_rank,
    stage2_state,
)


def recipe_of(compensation=None, ptq='mse', **weight):
    return resolve_recipe(
        dict(
            base='w3a3',
            scope='all',
            weight=dict(ptq=ptq, **weight),
            stage2=dict(compensation=compensation),
        )
    )


def test_weights_are_on_the_grid_and_errors_are_measured():
    model, run = stage1_stack()
    floats = {n: la.weight.detach().clone() for n, la in quantized_layers(model).items()}
    result = run_stage2(model, recipe_of(), run)
    assert list(result.layers) == list(floats)
    for name, layer in quantized_layers(model).items():
        assert is_on_grid(layer), name
        weight = layer.folded_weight(floats[name]).detach().double()  # as the layer multiplies it
        noise = layer.folded_weight().detach().double() - weight
        assert result.layers[name].weight_mse == pytest.approx(float(noise.square().mean()))
        ratio = weight.square().sum() / noise.square().sum()
        assert result.layers[name].weight_sqnr_db == pytest.approx(10 * math.log10(ratio), abs=1e-3)
    worst = min(r.weight_sqnr_db for r in result.layers.values())
    assert result.summary['min_sqnr_db'] == worst
    assert result.side_params == result.side_flops == 0


def test_output_is_that_of_fake_quantized_float_weights():
    """Codes written to the weight and codes computed from the float weight agree."""
    model, run = stage1_stack(activation=dict(granularity='per_channel'))
    late = copy.deepcopy(model)
    run_stage2(model, recipe_of(), run)
    for name, layer in quantized_layers(late).items():
        source = quantized_layers(model)[name].weight_quantizer
        layer.weight_quantizer.set_qparams(source.scale, source.zero_point)
    x = images(1)[0]
    with torch.no_grad():
        assert torch.equal(model(x), late(x))


def test_saved_and_loaded_model_gives_the_same_output():
    recipe = recipe_of('qwt')
    model, run = stage1_stack(2, data=images(24))
    assert prepare_stage2(model, recipe) == ['layers.0', 'layers.1']
    result = run_stage2(model, recipe, run)
    assert all(r.fitted for r in result.blocks.values())
    fresh, _ = stage1_stack(2, seed=9)
    prepare_stage2(fresh, recipe)
    fresh.load_state_dict(model.state_dict())
    x = images(1, seed=3)[0]
    with torch.no_grad():
        assert torch.equal(fresh(x), model(x))


def test_compensation_brings_the_output_closer_and_is_counted():
    outputs, results = {}, {}
    x = images(16, seed=4).flatten(0, 1)
    for setting in (None, 'qwt'):
        model, run = stage1_stack(2, data=images(24))
        with torch.no_grad():
            wanted = model(x)
            results[setting] = run_stage2(model, recipe_of(setting), run)
            outputs[setting] = (model(x) - wanted).square().mean()
    assert outputs['qwt'] < outputs[None]
    assert results['qwt'].side_params == 2 * (36 + 6)
    assert results['qwt'].side_flops == 2 * 2 * 36 * 9  # 9 tokens an image


def test_runs_in_evaluation_mode_and_restores_every_mode():
    model, run = stage1_stack()
    model.train()
    model.stem.eval()
    seen = []
    for module in (model.drop, model.layers[0]):
        module.register_forward_hook(lambda m, *_: seen.append(m.training))
    run_stage2(model, recipe_of('qwt'), run)
    assert seen and not any(seen)
    assert model.training and model.layers[0].training and not model.stem.training


def test_progress_and_log_and_json(caplog):
    model, run = stage1_stack()
    steps = []
    with caplog.at_level(logging.INFO):
        result = run_stage2(
            model, recipe_of('qwt'), run, lambda *a: steps.append(a), logging.getLogger('test')
        )
    layers = list(quantized_layers(model))
    assert steps[: len(layers)] == [(n, i, len(layers)) for i, n in enumerate(layers)]
    assert steps[len(layers) :] == [('layers.0', 0, 2), ('layers.1', 1, 2)]
    assert len(caplog.records) == 2
    again = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert again['weights']['layers'][layers[0]]['num_bits'] == 3
    assert again['seconds'] > 0


def test_zero_weights_give_finite_json():
    model, run = stage1_stack()
    with torch.no_grad():
        for layer in quantized_layers(model).values():
            layer.weight.zero_()
    result = run_stage2(model, recipe_of(), run)
    assert result.summary == {'mean_sqnr_db': None, 'min_sqnr_db': None, 'worst_layer': None}
    assert json.dumps(result.as_dict(), allow_nan=False)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_broken_weight_is_named_before_anything_is_written(value):
    model, run = stage1_stack()
    with torch.no_grad():
        model.layers[1].ffn[0].weight[0, 0] = value
    before = model.stem.weight.clone()
    with pytest.raises(ValueError, match=r'^layers\.1\.ffn\.0: the weight holds NaN'):
        run_stage2(model, recipe_of(), run)
    assert torch.equal(model.stem.weight, before)
    assert not model.stem.weight_quantizer.is_calibrated


def test_second_run_is_refused():
    model, run = stage1_stack()
    run_stage2(model, recipe_of(), run)
    with pytest.raises(ValueError, match='already quantized; load the stage-1 checkpoint'):
        run_stage2(model, recipe_of(), run)


def test_uncalibrated_input_scale_is_refused():
    model = BlockStack()
    convert_(model, dict(scope='all', activation=dict(granularity='per_channel')))
    with pytest.raises(UncalibratedError, match='stem'):
        run_stage2(model, recipe_of())


def test_data_is_asked_for_where_needed():
    model, _ = stage1_stack()
    with pytest.raises(ValueError, match='give run_pass'):
        run_stage2(model, recipe_of('qwt'))
    assert run_stage2(model, recipe_of()).layers


def test_float_model_is_refused():
    with pytest.raises(ValueError, match='convert it first'):
        run_stage2(BlockStack(), recipe_of())


def test_weights_trained_on_a_grid_keep_their_scale():
    model, run = stage1_stack(weight=dict(qat=True, learn_scale=True))
    assert calibrate_trained_weights(model) == len(quantized_layers(model))
    with torch.no_grad():
        model.stem.weight_quantizer.scale.mul_(1.25)  # as if trained
    x = images(1)[0]
    with torch.no_grad():
        before = model(x)
        result = run_stage2(model, recipe_of('qwt', qat=True, learn_scale=True), run)
        assert torch.equal(model(x), before)
    assert not any(r.fitted for r in result.blocks.values())  # no error left to mend


@pytest.mark.parametrize('ptq', ['gptq', ['repq', 'gptq', 'bias_correction'], 'adaround', 'brecq'])
def test_an_algorithm_leaves_weights_alone_that_trained_on_a_grid(ptq):
    model, run = stage1_stack(weight=dict(qat=True, learn_scale=True))
    calibrate_trained_weights(model)
    x = images(1)[0]
    with torch.no_grad():
        before = model(x)
        result = run_stage2(model, recipe_of(ptq=ptq, qat=True, learn_scale=True), run)
        assert torch.equal(model(x), before)
    assert list(result.layers) == list(quantized_layers(model))
    assert result.notes == ['every weight was quantized in stage 1 and is rounded by its scale']


class Detector(BlockStack):
    def __init__(self):
        super().__init__()
        self.roi_head = nn.Linear(3, 3)


@pytest.mark.parametrize(
    ('setting', 'make', 'wanted'),
    [
        (None, BlockStack, None),
        ('auto', BlockStack, 'auto'),
        ('auto', Detector, None),
        ('auto', lambda: nn.Sequential(nn.Linear(2, 2)), None),
        ('qwt', Detector, 'auto'),
        (dict(type='qwt', blocks=['layers.0'], ridge=0.5), Detector, ['layers.0']),
        (dict(type='auto', ridge=0.5), Detector, None),
    ],
)
def test_who_gets_compensation(setting, make, wanted):
    options = resolve_compensation(make(), dict(stage2=dict(compensation=setting)))
    assert (options and options['blocks']) == wanted


@pytest.mark.parametrize(
    ('stage2', 'message'),
    [
        (
            dict(compensation='qtw'),
            "compensation='qtw': .* or None; did you mean 'qwt'",
        ),
        (dict(compensation=dict(type='qwt', lamda=1)), "no key 'lamda'; the keys are"),
        (dict(compensate='qwt'), "no key 'compensate'"),
    ],
)
def test_wrong_stage2_sections_are_refused(stage2, message):
    with pytest.raises(ValueError, match=message):
        resolve_compensation(BlockStack(), dict(stage2=stage2))


def test_wrong_algorithm_is_refused_when_the_model_is_built():
    model, _ = stage1_stack()
    with pytest.raises(ValueError, match='unknown; write one of'):
        prepare_stage2(model, recipe_of(ptq='gptq4'))


def test_two_ranks_give_the_bits_of_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(stage2_on_rank, (2, port, str(tmp_path)), nprocs=2)
    alone = stage2_state(images(25))
    assert alone['layers.0.compensation.fitted'] and alone['layers.1.compensation.fitted']
    for rank in range(2):
        state = torch.load(tmp_path / f'{rank}.pt', weights_only=True)
        different = [n for n in alone if not torch.equal(alone[n], state[n])]
        assert different == []
