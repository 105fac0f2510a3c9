# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Figures of a calibrated start, roles one at a time, and equality of one rank and two."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from gplq_mm.analysis.start_error import WEIGHTS, StartMeter, StartOutputs, active_roles, floating
from gplq_mm.calibration.activation_ranges import calibrate_activations, calibrate_trained_weights
from gplq_mm.convert import convert_, quantizers
from gplq_mm.stream.distributed import world
from tests.helpers.tiny_blocks import BlockStack


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 9, 8, generator=generator) * (i + 1) for i in range(5)]


def numbered() -> Iterator[tuple[int, Tensor]]:
    rank, size = world()
    for number in range(rank, 5, size):
        yield number, images()[number]


def make_model(num_bits: int = 3, qat: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = BlockStack().eval()
    weight = {'qat': qat, 'learn_scale': qat}
    convert_(model, {'scope': 'all', 'activation': {'num_bits': num_bits}, 'weight': weight})

    def run() -> None:
        with torch.no_grad():
            for _, image in numbered():
                model(image)

    calibrate_activations(model, run)
    calibrate_trained_weights(model)
    for name, quantizer in quantizers(model, 'activation').items():
        if 'ffn.2' in name:
            quantizer.role = 'post_gelu'  # as the handler of a library's FFN says
    return model


def outputs(model: nn.Module, batch: Tensor) -> StartOutputs:
    found = model(batch)
    return StartOutputs([found, found[:, :1]], scores=[found[..., :2]], logits=[found.mean(1)])


def as_float(model: nn.Module) -> AbstractContextManager[None]:
    return floating(quantizers(model).values())


def meter(model: nn.Module) -> StartMeter:
    return StartMeter(model, lambda b: outputs(model, b), numbered, lambda: as_float(model))


def state(model: nn.Module) -> list[Any]:
    found = [(q.enabled, q.observer, q.is_calibrated, q.spec) for q in quantizers(model).values()]
    return [*found, {k: v.clone() for k, v in model.state_dict().items()}]


def test_figures_are_those_of_the_formulas() -> None:
    model = make_model()
    figures = meter(model).figures()
    with torch.no_grad():
        quantized = torch.cat([model(x) for x in images()])
        with as_float(model):
            floats = torch.cat([model(x) for x in images()])

    def error(part: Any) -> float:
        difference = quantized[part].double() - floats[part].double()
        return float(difference.square().sum() / floats[part].double().square().sum())

    assert figures.levels == pytest.approx((error(...), error((slice(None), slice(1)))))
    assert figures.feature_error == pytest.approx(sum(figures.levels) / 2)
    assert figures.rpn_error == pytest.approx(error((..., slice(2))))
    p, q = (x.mean(1).double().log_softmax(1) for x in (floats, quantized))
    assert figures.kl == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()))
    same = (p.argmax(1) == q.argmax(1)).double().mean()
    assert figures.agreement == pytest.approx(float(same))


def test_a_float_model_has_no_error() -> None:
    model = make_model()
    with as_float(model):
        figures = meter(model).figures()
    assert figures.feature_error == 0
    assert figures.kl == pytest.approx(0, abs=1e-12)
    assert figures.agreement == 1


def test_only_what_a_model_has_is_reported() -> None:
    model = make_model()
    plain = StartMeter(model, lambda b: StartOutputs([model(b)]), numbered, lambda: as_float(model))
    assert set(plain.figures().as_dict()) == {'feature_error', 'levels'}


def test_the_role_whose_scales_are_ruined_costs_most() -> None:
    model = make_model(num_bits=8)
    roles = active_roles(model)
    assert {'input', 'post_gelu'} <= set(roles)
    for quantizer in roles['post_gelu']:
        quantizer.set_qparams(quantizer.scale.detach() * 100, quantizer.zero_point)
    errors = meter(model).role_errors()
    assert {e.role: e.operands for e in errors} == {r: len(q) for r, q in roles.items()}
    assert errors[0].role == 'post_gelu'
    assert errors[0].feature_error < 0.1 * errors[1].feature_error
    assert errors == sorted(errors, key=lambda e: e.feature_error)


def test_weights_that_train_stand_beside_the_roles() -> None:
    assert WEIGHTS not in active_roles(make_model())
    model = make_model(num_bits=8, qat=True)
    for quantizer in active_roles(model)[WEIGHTS]:
        quantizer.set_qparams(quantizer.scale.detach() * 100, quantizer.zero_point)
    assert meter(model).role_errors()[0].role == WEIGHTS


def test_measuring_leaves_every_quantizer_as_it_was() -> None:
    model = make_model()
    off = next(iter(quantizers(model).values()))
    off.enabled = False
    before = state(model)
    meter(model).figures()
    meter(model).role_errors()
    after = state(model)
    assert after[:-1] == before[:-1]
    assert all(torch.equal(after[-1][k], v) for k, v in before[-1].items())


def test_a_role_is_quantized_again_where_a_pass_fails() -> None:
    model = make_model()
    roles = active_roles(model)
    with pytest.raises(RuntimeError), floating(roles['input']):
        assert not any(q.enabled for q in roles['input'])
        model(torch.ones(1, 1, 1))
    assert all(q.enabled for q in roles['input'])


def test_an_error_that_is_no_number_is_last_among_the_roles() -> None:
    model = make_model()
    broken = StartMeter(
        model,
        lambda b: StartOutputs([model(b) * (1 if not active_roles(model) else float('nan'))]),
        numbered,
        lambda: as_float(model),
    )
    assert broken.figures().feature_error != broken.figures().feature_error
    assert len(broken.role_errors()) == len(active_roles(model))


def measured() -> dict[str, Any]:
    found = meter(make_model())
    return {'figures': found.figures().as_dict(), 'roles': [asdict(r) for r in found.role_errors()]}


def work(rank: int, init_file: str, out: str, size: int) -> None:
    dist.init_process_group('gloo', init_method=f'file://{init_file}', rank=rank, world_size=size)
    torch.save(measured(), f'{out}.{rank}')
    dist.destroy_process_group()


def test_two_ranks_find_the_figures_of_one(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path / 'init'), str(tmp_path / 'out'), 2), nprocs=2)
    alone = measured()
    assert [torch.load(tmp_path / f'out.{rank}') for rank in (0, 1)] == [alone, alone]
