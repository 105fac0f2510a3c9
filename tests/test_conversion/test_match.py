# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import pytest

from gplq_mm.conversion.match import ROLES, RuleBook, in_scope, matches

BASE = {'num_bits': 4, 'signed': True}


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
    assert matches(rule, name, role) is expected


def test_scope_is_by_whole_name_parts():
    assert in_scope('backbone', ('backbone',)) and in_scope('backbone.a.b', ('backbone',))
    assert not in_scope('backbone2.a', ('backbone',)) and not in_scope('', ('backbone',))
    assert in_scope('', ('',)) and in_scope('x.y', ('',))
    assert in_scope('neck.a', ('backbone', 'neck')) and not in_scope('x', ())


def test_the_last_matching_rule_wins():
    rules = [
        {'name': '*', 'num_bits': 8},
        {'name': 'a.*', 'num_bits': 3},
        {'name': 'a.b', 'activation': {'num_bits': 2}},
    ]
    bits = {
        (name, kind): RuleBook(rules).resolve(BASE, kind, name, 'input')['num_bits']
        for name in ('a.b', 'a.c', 'x')
        for kind in ('activation', 'weight')
    }
    assert bits['a.b', 'activation'] == 2 and bits['a.b', 'weight'] == 3
    assert bits['a.c', 'activation'] == bits['a.c', 'weight'] == 3
    assert bits['x', 'activation'] == 8
    reverse = RuleBook(rules[::-1]).resolve(BASE, 'activation', 'a.b', 'input')
    assert reverse['num_bits'] == 8


def test_inside_a_rule_the_kinds_own_settings_win():
    rule = {'name': '*', 'num_bits': 8, 'weight': {'num_bits': 3}}
    book = RuleBook([rule])
    assert book.resolve(BASE, 'weight', 'a', 'input')['num_bits'] == 3
    assert book.resolve(BASE, 'activation', 'a', 'input')['num_bits'] == 8


def test_the_base_is_kept_and_not_changed():
    base = dict(BASE)
    settings = RuleBook([{'name': '*', 'enabled': False}]).resolve(base, 'weight', 'a', 'input')
    assert settings == {'num_bits': 4, 'signed': True, 'enabled': False}
    assert base == BASE
    assert RuleBook([]).resolve(base, 'weight', 'a', 'input')['enabled'] is True


def test_rules_that_match_nothing_are_named_unless_optional():
    rules = [{'name': 'a'}, {'name': 'typo'}, {'role': 'softmax', 'optional': True}]
    book = RuleBook(rules)
    assert list(book.unmatched()) == rules[:2]
    book.resolve(BASE, 'weight', 'a', 'input')
    assert list(book.unmatched()) == [rules[1]]


def test_roles_are_unique():
    assert len(set(ROLES)) == len(ROLES)
