# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import copy

import pytest
import torch

from gplq_mm.analysis.operands import (
    KINDS,
    activation_precisions,
    baseline,
    bit_rules,
    check_bits,
    count_elements,
    find_operands,
    quantized_as,
    weight_precisions,
)
from gplq_mm.calibration.activation_ranges import observe_activations
from gplq_mm.convert import convert_, quantizers, resolve_recipe
from gplq_mm.ptq import build_weight_ptq
from gplq_mm.ptq.stage2 import run_stage2
from gplq_mm.recipe import Rule
from tests.helpers.tiny_blocks import BlockStack, images, stage1_stack

MINMAX = dict(observer='minmax')


def assert_same_state(model, before):
    after = model.state_dict()
    assert set(after) == set(before)
    assert [k for k in before if not torch.equal(before[k], after[k])] == []


def test_operands_are_named_as_rules_see_them():
    rules = [dict(name='stem', weight=dict(num_bits=8)), dict(name='layers.0.*', num_bits=5)]
    model, _ = stage1_stack(activation=MINMAX, rules=rules)
    found = find_operands(model, [Rule.from_dict(rule) for rule in rules])
    assert len(found) == len(quantizers(model))
    stem = found['weight:stem']
    assert (stem.num_bits, stem.pinned, stem.weights, stem.module) == (8, True, 8 * 6, 'stem')
    assert not found['activation:stem'].pinned
    assert found['activation:layers.0.ffn.2'].role == 'input'
    assert all(o.pinned == (o.num_bits != 3) for o in found.values())
    assert {o.kind for o in find_operands(model, (), ['weight']).values()} == {'weight'}


@pytest.mark.parametrize('kinds', [KINDS, ('weight',), ('activation',)])
def test_rules_resolve_to_exactly_the_assigned_bits(kinds):
    own = [dict(name='stem', num_bits=8), dict(role='input', activation=dict(num_bits=5))]
    model, _ = stage1_stack(activation=MINMAX, rules=own)
    operands = find_operands(model, [Rule.from_dict(rule) for rule in own])
    bits = {k: 2 + i % 5 for i, (k, o) in enumerate(operands.items()) if o.kind in kinds}
    rules = bit_rules(operands, bits)
    fresh = BlockStack()
    convert_(fresh, dict(base='w3a3', scope='all', rules=[*own, *rules]))
    for key, operand in find_operands(fresh).items():
        assert operand.num_bits == bits.get(key, operands[key].num_bits), key
    if len(kinds) == 1:
        assert all(set(rule) == {'name', kinds[0]} for rule in rules)


def test_equal_bits_give_one_short_rule():
    model, _ = stage1_stack(activation=MINMAX)
    operands = find_operands(model)
    assert bit_rules(operands, {'weight:stem': 3, 'activation:stem': 3}) == []
    assert bit_rules(operands, {'weight:stem': 4, 'activation:stem': 4}) == [
        {'name': 'stem', 'num_bits': 4}
    ]


@pytest.mark.parametrize('granularity', ['per_tensor', 'per_channel'])
def test_a_weight_alone_is_what_stage_2_makes_of_it(granularity):
    """And the model is left bit for bit as it was."""
    setting, weight = dict(MINMAX, granularity=granularity), dict(ptq='minmax')
    model, run = stage1_stack(activation=setting)
    done = copy.deepcopy(model)
    run_stage2(done, resolve_recipe(dict(base='w3a3', activation=setting, weight=weight)), run)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    operand = find_operands(model)['weight:layers.1.ffn.0']
    found = weight_precisions(model, operand, [2, 3], build_weight_ptq('minmax'))
    assert_same_state(model, before)
    layer = done.layers[1].ffn[0]
    assert torch.equal(found[3].weight, layer.weight)
    assert torch.equal(found[3].scale, layer.weight_quantizer.scale)
    assert not torch.equal(found[2].weight, found[3].weight)


def test_activation_ranges_are_those_of_calibration():
    setting = dict(observer='percentile')
    model, run = stage1_stack(4, activation=setting)
    found = observe_activations(model, run)
    for bits in (3, 8):
        other, _ = stage1_stack(bits, activation=setting)
        for name, quantizer in quantizers(other, 'activation').items():
            precision = activation_precisions(found[name], [bits])[bits]
            assert torch.equal(precision.scale.reshape(-1), quantizer.scale.reshape(-1))
            assert torch.equal(precision.zero_point.reshape(-1), quantizer.zero_point.reshape(-1))
            assert precision.spec == quantizer.spec


def test_only_the_chosen_operand_is_quantized_and_all_is_restored():
    model, _ = stage1_stack(activation=MINMAX)
    with torch.no_grad():
        model.stem.input_quantizer.scale.neg_()  # a learned scale may be anything
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = {n: (q.enabled, q.is_calibrated, q.spec) for n, q in quantizers(model).items()}
    x = images(1)[0]
    chosen = find_operands(model)['weight:stem']
    with baseline(model, False), torch.no_grad():
        assert not model.training
        reference = model(x)
        at = weight_precisions(model, chosen, [2], build_weight_ptq('minmax'))[2]
        with quantized_as(model, {chosen.path: at}):
            active = [n for n, q in quantizers(model).items() if q.is_active]
            assert active == ['stem.weight_quantizer']
            expected = torch.nn.functional.linear(x, at.weight, model.stem.bias)
            assert torch.equal(model.stem(x), expected)
            assert not torch.equal(model(x), reference)
        assert torch.equal(model(x), reference)
    assert_same_state(model, before)
    assert flags == {n: (q.enabled, q.is_calibrated, q.spec) for n, q in quantizers(model).items()}
    assert model.training


def test_elements_are_counted():
    model, _ = stage1_stack(activation=MINMAX)
    counts = count_elements(model, find_operands(model), lambda: model(images(1)[0]))
    assert counts['activation:stem'] == 9 * 8
    assert counts['activation:layers.0.ffn.2'] == 9 * 12
    assert set(counts) == set(find_operands(model, (), ['activation']))
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize('kinds', [(), ('weights',)])
def test_unknown_kinds_are_refused(kinds):
    with pytest.raises(ValueError, match=r"write one or both of \['weight', 'activation'\]"):
        find_operands(stage1_stack(activation=MINMAX)[0], (), kinds)


def test_float_model_is_refused():
    with pytest.raises(ValueError, match='convert it first'):
        find_operands(BlockStack())


@pytest.mark.parametrize(
    ('bits', 'message'), [([], 'no candidate bits'), ([1], 'num_bits=1'), ([4, 16], 'num_bits=16')]
)
def test_wrong_bits_are_refused(bits, message):
    with pytest.raises(ValueError, match=message):
        check_bits(bits)
