# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""On a trained classifier, mixed bits beat uniform ones of the same mean."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip('mmdet')
pytest.importorskip('mmpretrain')

from gplq_mm.analysis.bit_assignment import size_groups
from gplq_mm.analysis.bit_search import search_bits
from gplq_mm.analysis.operands import baseline, bit_rules, find_operands, weight_precisions
from gplq_mm.analysis.output_metrics import KL
from gplq_mm.analysis.sensitivity import SensitivityMeter
from gplq_mm.calibration.activation_ranges import calibrate_activations
from gplq_mm.convert import set_quantization
from gplq_mm.ptq import build_weight_ptq
from gplq_mm.ptq.stage2 import run_stage2
from tests.test_real_data import build, cifar

W3: dict[str, Any] = dict(  # per-tensor inputs: weights are quantized without calibration
    base='w4a4_v1', weight=dict(num_bits=3, ptq='minmax'), activation=dict(observer='minmax')
)
BITS = [2, 3, 4]


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    inputs = model.data_preprocessor({'inputs': images})['inputs']
    return torch.cat([model(part) for part in inputs.split(250)])


def quantized_weights(data: Path, rules: list[dict[str, Any]], images: Tensor) -> Tensor:
    """Logits with the weights quantized, activations float; no layer sees any data."""
    model = build(data, 'vit_cifar10', {**W3, 'rules': rules})[1]
    run_stage2(model, model.gplq.recipe)
    set_quantization(model, False, 'activation')
    return logits(model, images)


def test_mixed_bits_beat_uniform_bits_of_the_same_mean(gplq_data: Path) -> None:
    model = build(gplq_data, 'vit_cifar10', W3)[1]
    images, _ = cifar(gplq_data, 'test', 2000)
    training, _ = cifar(gplq_data, 'train', 32)
    calibrate_activations(model, lambda: logits(model, training[:8]))
    operands = find_operands(model, model.gplq.recipe.rules, ['weight'])
    free = {key: operand for key, operand in operands.items() if not operand.pinned}
    ptq, found = build_weight_ptq('minmax'), {}
    with baseline(model, False):
        reference = logits(model, images)
        meter = SensitivityMeter(
            model, KL(), lambda b: [logits(model, b[1])], lambda: enumerate([training])
        )
        for key, operand in free.items():
            found[key] = meter.measure(operand, weight_precisions(model, operand, BITS, ptq))
    increases = {key: {b: m.increase for b, m in own.items()} for key, own in found.items()}
    errors = {key: {b: m.sketch for b, m in own.items()} for key, own in found.items()}
    sizes = {key: operand.weights for key, operand in free.items()}
    plan = search_bits(size_groups(increases, sizes, errors), 3 * sum(sizes.values()))
    bits = {key: b for choice in plan for key, b in choice.bits.items()}
    assert sum(sizes[k] * b for k, b in bits.items()) <= 3 * sum(sizes.values())
    mixed = quantized_weights(gplq_data, bit_rules(operands, bits), images)
    uniform = quantized_weights(gplq_data, [], images)
    kl = [KL().increase(KL().terms([reference], [o])) for o in (mixed, uniform)]
    agree = [float((o.argmax(1) == reference.argmax(1)).float().mean()) for o in (mixed, uniform)]
    assert kl[0] < 0.95 * kl[1]
    assert agree[0] > agree[1]
