# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import pytest

from gplq_mm.recipe import Rule


@pytest.mark.parametrize(
    ('rule', 'name', 'role', 'expected'),
    [
        ({'name': '*.attn.*'}, 'backbone.attn.qkv', 'input', True),
        ({'name': '*.attn.*'}, 'backbone.ffn.0', 'input', False),
        ({'name': 'backbone.ffn.[02]'}, 'backbone.ffn.2', 'input', True),
        ({'name': 'backbone.ffn'}, 'backbone.ffn.0', 'input', False),
        ({'name': '*.FFN.*'}, 'backbone.ffn.0', 'input', False),
        ({'role': 'softmax'}, 'anything', 'softmax', True),
        ({'role': 'softmax'}, 'anything', 'input', False),
        ({'name': 'a.*', 'role': 'softmax'}, 'a.b', 'softmax', True),
        ({'name': 'a.*', 'role': 'softmax'}, 'b.b', 'softmax', False),
    ],
)
def test_a_rule_matches_its_name_and_role(rule, name, role, expected):
    assert Rule.from_dict({**rule, 'num_bits': 8}).matches(name, role) is expected


@pytest.mark.parametrize(
    ('rule', 'message'),
    [
        ({'num_bits': 8}, r"names nothing; give name='\*.pattern.\*' or role='softmax'"),
        ({'name': '*'}, 'changes nothing; give num_bits'),
        ({'name': '*', 'activation': {}, 'optional': True}, 'changes nothing'),
        ({'name': '*', 'weight': {'ptq': 'mse'}}, r'weight\.ptq: stage 2 quantizes all weights by'),
        ({'name': '*', 'enabled': 'no'}, r"enabled='no': write True or False"),
        ({'name': 3, 'num_bits': 8}, 'name=3: write a string'),
    ],
)
def test_a_rule_that_names_or_says_nothing_is_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        Rule.from_dict(rule, 'rules[0]')


def test_a_rule_is_stored_as_it_was_written():
    rule = {'role': 'image', 'num_bits': 8, 'activation': {'granularity': 'per_tensor'}}
    assert Rule.from_dict(rule).as_dict() == rule
    assert Rule.from_dict(rule) == Rule.from_dict(dict(reversed(rule.items())))
    assert Rule.from_dict(rule) != Rule.from_dict({**rule, 'optional': True})
