# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Calibration layer by layer: order, worth, and equality of one rank and two."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from gplq_mm.calibration.activation_ranges import calibrate_activations
from gplq_mm.calibration.layerwise import LayerwiseResult, calibrate_layerwise
from gplq_mm.convert import convert_, quantized_layers, set_quantization
from gplq_mm.ops import QuantizedLayer, QuantLinear
from gplq_mm.ptq.stage2 import run_stage2
from gplq_mm.stream.distributed import world
from tests.helpers.tiny_blocks import BlockStack, images, run_pass


def calibrated(bits: int = 3, width: int = 16, **options) -> tuple[BlockStack, LayerwiseResult]:
    torch.manual_seed(0)
    model = BlockStack(width=width).eval()
    convert_(model, dict(base=f'w{bits}a{bits}', scope='all'))
    rank, size = world()
    run = run_pass(model, images(48)[rank::size])
    calibrate_activations(model, run)
    return model, calibrate_layerwise(model, run, **options)


def error(model: BlockStack) -> float:
    """Relative error of the outputs against the float model of the same seed, on new images."""
    torch.manual_seed(0)
    reference = BlockStack(width=16).eval()
    with torch.no_grad():
        pairs = [(model(x), reference(x)) for x in images(8, seed=7)]
    lost = sum(float((q - f).square().sum()) for q, f in pairs)
    return lost / sum(float(f.square().sum()) for _, f in pairs)


def test_every_layer_is_searched_and_fitted_in_the_order_of_the_model():
    model, result = calibrated()
    names = list(quantized_layers(model))
    assert list(result.choices) == names == list(result.compensations)
    assert set(result.as_dict()) == set(names)
    assert all({'strength', 'clip', 'damping'} <= set(v) for v in result.as_dict().values())
    assert len(result.summary()) == 2


def test_it_brings_the_model_closer_to_the_float_one():
    plain, _ = calibrated(2, migrate=False, compensate_weights=False)
    fitted, _ = calibrated(2)
    assert error(fitted) < 0.9 * error(plain)


def test_scales_only_leaves_the_weights_alone():
    model, result = calibrated(compensate_weights=False)
    torch.manual_seed(0)
    reference = BlockStack(width=16)
    assert not result.compensations
    for name, layer in quantized_layers(model).items():
        assert torch.equal(layer.weight, reference.get_submodule(name).weight)


def test_quantizers_and_modes_are_as_they_were():
    model, _ = calibrated()
    assert all(q.enabled for q in model.modules() if hasattr(q, 'enabled'))
    assert not model.training
    set_quantization(model, False)
    with torch.no_grad():
        assert torch.isfinite(model(images(1)[0])).all()


def work(rank: int, init_file: str, out: str) -> None:
    dist.init_process_group('gloo', f'file://{init_file}', rank=rank, world_size=2)
    torch.set_num_threads(1)
    model, result = calibrated()
    torch.save((model.state_dict(), result.as_dict()), f'{out}{rank}')
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason='needs torch.distributed')
def test_two_ranks_find_what_one_finds(tmp_path: Path):
    torch.set_num_threads(1)
    mp.spawn(work, (str(tmp_path / 'init'), str(tmp_path / 'out')), nprocs=2)
    model, result = calibrated()
    for rank in range(2):
        state, found = torch.load(tmp_path / f'out{rank}', weights_only=True)
        assert found == result.as_dict()
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


class OutsideLinear(QuantizedLayer, nn.Module):
    """A linear layer of another library: no `nn.Linear`, no `in_features`."""

    kind = 'outside'
    input_scale_on_weight = QuantLinear.input_scale_on_weight
    product = QuantLinear.product
    forward = QuantLinear.forward


class OwnLinear(QuantLinear):
    """Computed by the reference, as an operation that no backend knows."""

    kind = 'outside'


@pytest.mark.parametrize('ptq', ['repq', 'gptq'])
def test_an_operation_from_outside_is_treated_like_a_linear_layer(ptq: str) -> None:
    """Calibration by layer, RepQ and guided GPTQ ask the operation, not its class."""
    torch.manual_seed(0)
    states, x = [], torch.randn(32, 5, 8) * torch.linspace(0.2, 3, 8)
    stage2 = ['repq', 'minmax'] if ptq == 'repq' else dict(type='gptq', guided=0.5)
    granularity = 'per_tensor' if ptq == 'repq' else 'per_channel'
    recipe = dict(
        base='w4a4', scope='all', activation=dict(granularity=granularity), weight=dict(ptq=stage2)
    )
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 4)).eval()
    for outside in (False, True):
        network = copy.deepcopy(model)
        convert_(network, recipe)
        for layer in quantized_layers(network).values():
            layer.__class__ = OutsideLinear if outside else OwnLinear
            if outside:
                del layer.in_features, layer.out_features

        def run(network: nn.Module = network) -> None:
            for part in x.split(4):
                network(part)

        with torch.no_grad():
            calibrate_activations(network, run)
            fits = calibrate_layerwise(network, run)
            run_stage2(network, recipe, run)
        assert fits.compensations
        states.append(network.state_dict())
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())
