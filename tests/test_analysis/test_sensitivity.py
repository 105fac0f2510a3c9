# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gplq_mm.analysis.operands import baseline, find_operands, quantized_as, weight_precisions
from gplq_mm.analysis.output_metrics import KL, SQNR, build_metric
from gplq_mm.analysis.sensitivity import SKETCH, SensitivityMeter, sketch
from gplq_mm.convert import convert_, quantized_layers
from gplq_mm.ptq import GPTQ, PTQTask, SingleLayerGPTQ, build_weight_ptq
from tests.helpers.tiny_blocks import images, stage1_stack

BITS = [2, 3, 4, 8]


def outputs_of(count=3, size=(4, 5)):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(*size, generator=generator) for _ in range(count)]


def quantized_copy(layer):
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        copied.weight.mul_(1.5)
    return copied


def noisy(outputs, amount):
    generator = torch.Generator().manual_seed(8)
    return [o + amount * torch.randn(o.shape, generator=generator) for o in outputs]


def value(metric, reference, outputs):
    return metric.increase(metric.terms(reference, outputs))


def test_sqnr_is_the_mean_noise_ratio_of_the_outputs():
    reference = [10 * outputs_of(1)[0], outputs_of(1, (2, 3))[0], torch.zeros(4)]
    outputs = noisy(reference, 0.1)
    ratios = [
        float((o - r).double().square().sum() / r.double().square().sum())
        for r, o in zip(reference[:2], outputs[:2], strict=True)
    ]
    increase = value(SQNR(), reference, outputs)
    assert increase == pytest.approx(sum(ratios) / 2)
    assert SQNR().score(increase) == pytest.approx(-10 * math.log10(increase))
    assert value(SQNR(), reference, reference) == 0
    assert SQNR().score(0.0) is None


def test_kl_is_torchs():
    reference = outputs_of(1)
    outputs = noisy(reference, 0.5)
    p, q = (F.log_softmax(x[0].double(), 1) for x in (reference, outputs))
    expected = F.kl_div(q, p, log_target=True, reduction='batchmean')
    assert value(KL(), reference, outputs) == pytest.approx(float(expected))
    two = [F.logsigmoid(torch.stack([x[0], -x[0]]).double()) for x in (reference, outputs)]
    expected = F.kl_div(two[1], two[0], log_target=True, reduction='sum') / reference[0].numel()
    assert value(KL(sigmoid=True), reference, outputs) == pytest.approx(float(expected))


@pytest.mark.parametrize('metric', [SQNR(), KL(), KL(sigmoid=True)])
def test_squared_errors_are_the_increase_to_second_order(metric):
    reference = outputs_of(2, (40, 50))
    outputs = noisy(reference, 1e-2)
    sums = metric.terms(reference, outputs)
    weights = metric.error_weights(sums).expand(2)
    errors = metric.errors(reference, outputs)
    squares = [e.square().sum() * w**2 for e, w in zip(errors, weights, strict=True)]
    assert float(sum(squares)) == pytest.approx(metric.increase(sums), rel=0.02)


def test_sketches_keep_products():
    one, other = torch.randn(3000, 7), torch.randn(3000, 7)
    other += one / 2
    left, right = sketch([one], 5)[0], sketch([other], 5)[0]
    assert left.shape == (SKETCH,)
    norm = float(one.norm() * other.norm())
    assert float(left @ right) == pytest.approx(float((one * other).sum()), abs=0.15 * norm)
    assert float(left @ left) == pytest.approx(float(one.square().sum()), rel=0.2)
    assert not torch.equal(left, sketch([one], 6)[0])
    small = torch.randn(SKETCH)  # enough places for every element: nothing is lost
    assert float(sketch([small], 0).square().sum()) == pytest.approx(
        float(small.double() @ small.double())
    )


def meter_of(model, data, metric='sqnr', keep_bytes=2**20):
    calls = []

    def forward(batch):
        calls.append(batch[0])
        return [model(batch[1])]

    return SensitivityMeter(
        model, build_metric(metric), forward, lambda: enumerate(data), keep_bytes
    ), calls


def precisions_of(model, operand, bits=BITS):
    return weight_precisions(model, operand, bits, build_weight_ptq('minmax'))


@pytest.mark.parametrize('metric', ['sqnr', 'kl'])
def test_each_operand_is_measured_alone(metric):
    model, _ = stage1_stack(activation=dict(observer='minmax'))
    data = images(6)
    operand = find_operands(model)['weight:layers.0.attn.proj']
    found = precisions_of(model, operand)
    with baseline(model, False):
        meter, _ = meter_of(model, data, metric)
        measured = meter.measure(operand, found)
        with torch.no_grad():
            reference = [model(x) for x in data]
            with quantized_as(model, {operand.path: found[3]}):
                outputs = [model(x) for x in data]
    direct = value(build_metric(metric), [torch.cat(reference)], [torch.cat(outputs)])
    assert measured[3].increase == pytest.approx(direct, rel=1e-6)
    increases = [measured[b].increase for b in BITS]
    assert increases == sorted(increases, reverse=True)
    assert increases[-1] > 0


class Twins(nn.Module):
    """Two layers of equal weights side by side: their errors add up."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(8, 20), nn.Linear(8, 20)
        self.other.load_state_dict(self.one.state_dict())

    def forward(self, x):
        return self.one(x) + self.other(x)


def test_sketches_tell_that_errors_add_up():
    model = Twins()
    convert_(model, dict(base='w3a3', scope='all'))
    weights = find_operands(model, (), ['weight']).values()
    with baseline(model, False):
        meter, _ = meter_of(model, images(6))
        chosen = {o.path: precisions_of(model, o, [3])[3] for o in weights}
        alone = [meter.measure(o, {3: chosen[o.path]})[3] for o in weights]
        joint = meter.measure_together(chosen).increase
    assert joint == pytest.approx(4 * alone[0].increase, rel=1e-3)  # not 2: no independence
    together = float(sum(m.sketch for m in alone).square().sum())
    assert together == pytest.approx(joint, rel=0.15)


def test_references_are_kept_up_to_a_limit():
    model, _ = stage1_stack(activation=dict(observer='minmax'))
    operand = find_operands(model)['weight:stem']
    found = precisions_of(model, operand, [2, 4])
    results = []
    for keep_bytes, references in ((2**20, 6), (0, 12), (3 * 9 * 3 * 4, 9)):
        with baseline(model, False):
            meter, calls = meter_of(model, images(6), keep_bytes=keep_bytes)
            results.append([meter.measure(operand, found) for _ in range(2)][-1][2].increase)
        assert len(calls) == references + 2 * 6 * 2
    assert len(set(results)) == 1


def test_broken_outputs_are_named():
    model, _ = stage1_stack(activation=dict(observer='minmax'))
    operand = find_operands(model)['weight:stem']
    found = precisions_of(model, operand, [2])
    with torch.no_grad():
        model.head.bias.fill_(math.nan)
    with baseline(model, False), pytest.raises(ValueError, match=r'^weight:stem: .*at 2 bits'):
        meter_of(model, images(2))[0].measure(operand, found)


def test_unknown_metric_is_refused():
    with pytest.raises(
        ValueError, match=r"metric='mse' is unknown; write one of \['kl', 'loss', 'sqnr'\]"
    ):
        build_metric('mse')


@pytest.mark.parametrize('budget', [1 << 20, 0])
def test_a_layer_alone_gets_the_codes_of_gptq_on_its_stage_1_inputs(budget, tmp_path):
    model, run = stage1_stack(3)
    layers = quantized_layers(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    alone = SingleLayerGPTQ(GPTQ(), model, layers, run, budget, str(tmp_path))
    for key, operand in find_operands(model, (), ['weight']).items():
        found = weight_precisions(model, operand, [2, 4], [alone])
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), key
        for bits, precision in found.items():
            other, other_run = stage1_stack(3)
            layer = quantized_layers(other)[operand.module]
            weight = nn.Parameter(layer.weight.detach().clone())
            layer.weight_quantizer.spec = precision.spec
            layer.weight_quantizer.quant_range.copy_(torch.tensor(precision.spec.quant_range))
            task = PTQTask(other, {operand.module: layer}, {operand.module: weight}, other_run)
            with torch.no_grad():
                GPTQ().apply(task)
            assert precision.spec.num_bits == bits
            assert torch.equal(precision.weight, layer.weight), (key, bits)
            assert not torch.equal(precision.weight, weight)


def test_a_layer_that_no_image_reaches_is_rounded_to_nearest():
    model, run = stage1_stack(3)
    model.spare = quantized_copy(model.head)
    alone = SingleLayerGPTQ(GPTQ(), model, quantized_layers(model), run)
    operand = find_operands(model, (), ['weight'])['weight:spare']
    found = weight_precisions(model, operand, [3], [alone])[3]
    nearest = weight_precisions(model, operand, [3], build_weight_ptq('mse'))[3]
    assert torch.equal(found.weight, nearest.weight)
