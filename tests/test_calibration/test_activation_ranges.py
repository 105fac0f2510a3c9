# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Calibration: ranges, refusals, and equality of one rank and two."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from gplq_mm.calibration.activation_ranges import calibrate_activations, is_calibrated
from gplq_mm.convert import convert_, quantizers
from gplq_mm.stream.distributed import world

OBSERVERS = ('minmax', 'moving_average', 'percentile', 'mse')


def make_model(observer: str, granularity: str = 'per_tensor') -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))
    activation = {'num_bits': 3, 'observer': observer, 'granularity': granularity}
    convert_(model, {'scope': 'all', 'activation': activation})
    return model


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 6, generator=generator) * (i + 1) for i in range(7)]


def my_share() -> Iterator[Tensor]:
    rank, size = world()
    yield from images()[rank::size]


def calibrated_state(observer: str, granularity: str) -> dict[str, Tensor]:
    model = make_model(observer, granularity)

    def run() -> None:
        with torch.no_grad():
            for image in my_share():
                model(image)

    calibrate_activations(model, run)
    return {k: v for k, v in model.state_dict().items() if 'input_quantizer' in k}


def work(rank: int, init_file: str, out: str) -> None:
    dist.init_process_group('gloo', init_method=f'file://{init_file}', rank=rank, world_size=2)
    states = {
        (o, g): calibrated_state(o, g) for o in OBSERVERS for g in ('per_tensor', 'per_channel')
    }
    torch.save(states, f'{out}.{rank}')
    dist.destroy_process_group()


def test_two_ranks_find_the_scales_of_one(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path / 'init'), str(tmp_path / 'out')), nprocs=2)
    for rank in range(2):
        states = torch.load(tmp_path / f'out.{rank}')
        for (observer, granularity), state in states.items():
            alone = calibrated_state(observer, granularity)
            assert set(alone) == set(state)
            for key, value in alone.items():
                assert torch.equal(value, state[key]), (observer, granularity, key)


@pytest.mark.parametrize('observer', OBSERVERS)
def test_calibration_sees_the_float_model_and_sets_every_range(observer: str) -> None:
    model = make_model(observer)
    float_model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))
    float_model.load_state_dict(model.state_dict(), strict=False)
    outputs: list[Tensor] = []

    def run() -> None:
        outputs.append(model(images()[0]))

    assert not is_calibrated(model)
    assert calibrate_activations(model, run) == 2
    assert is_calibrated(model)
    for output in outputs:
        assert torch.equal(output, float_model(images()[0]))
    assert not torch.equal(model(images()[0]), outputs[0])


def test_minmax_covers_the_union_of_the_images() -> None:
    model = make_model('minmax')

    def run() -> None:
        for image in images():
            model(image)

    calibrate_activations(model, run)
    quantizer = quantizers(model, 'activation')['0.input_quantizer']
    data = torch.cat(images())
    expected = (data.max().clamp_min(0) - data.min().clamp_max(0)) / 7
    assert torch.allclose(quantizer.scale, expected)


def test_nan_is_refused_with_the_quantizers_name() -> None:
    model = make_model('mse')
    with pytest.raises(ValueError, match=r'0\.input_quantizer.*NaN'):
        calibrate_activations(model, lambda: model(torch.full((2, 6), float('nan'))))
    assert all(q.observer is None for q in quantizers(model).values())
    assert not is_calibrated(model)


def test_a_layer_never_reached_is_named() -> None:
    model = make_model('mse')
    with pytest.raises(ValueError, match=r"never reached.*2\.input_quantizer.*name='2'"):
        calibrate_activations(model, lambda: model[0](torch.ones(2, 6)))


def test_running_twice_gives_the_same_scales() -> None:
    first = calibrated_state('mse', 'per_channel')
    second = calibrated_state('mse', 'per_channel')
    assert all(torch.equal(first[k], second[k]) for k in first)
