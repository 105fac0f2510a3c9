# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import pytest

from gplq_mm.recipe import ROLES, Rule, RuleBook, as_recipe, in_scope, sets_bits

BASE = as_recipe('w4a4_v1')


def rules_of(*rules):
    return [Rule.from_dict(rule) for rule in rules]


def bits(rules, kind, name, role='input'):
    return RuleBook(rules).resolve(getattr(BASE, kind), kind, name, role).num_bits


def test_scope_is_by_whole_name_parts():
    assert in_scope('backbone', ('backbone',)) and in_scope('backbone.a.b', ('backbone',))
    assert not in_scope('backbone2.a', ('backbone',)) and not in_scope('', ('backbone',))
    assert in_scope('', ('',)) and in_scope('x.y', ('',))
    assert in_scope('neck.a', ('backbone', 'neck')) and not in_scope('x', ())


def test_the_last_matching_rule_wins():
    rules = rules_of(
        {'name': '*', 'num_bits': 8},
        {'name': 'a.*', 'num_bits': 3},
        {'name': 'a.b', 'activation': {'num_bits': 2}},
    )
    assert bits(rules, 'activation', 'a.b') == 2 and bits(rules, 'weight', 'a.b') == 3
    assert bits(rules, 'activation', 'a.c') == bits(rules, 'weight', 'a.c') == 3
    assert bits(rules, 'activation', 'x') == 8
    assert bits(rules[::-1], 'activation', 'a.b') == 8


def test_inside_a_rule_the_kinds_own_settings_win():
    rules = rules_of({'name': '*', 'num_bits': 8, 'weight': {'num_bits': 3}})
    assert bits(rules, 'weight', 'a') == 3 and bits(rules, 'activation', 'a') == 8


def test_the_base_is_kept_and_not_changed():
    before = BASE.weight.as_dict()
    off = RuleBook(rules_of({'name': '*', 'enabled': False}))
    settings = off.resolve(BASE.weight, 'weight', 'a', 'input')
    assert settings.as_dict() == {**before, 'enabled': False}
    assert BASE.weight.as_dict() == before and BASE.weight.enabled
    assert RuleBook([]).resolve(BASE.weight, 'weight', 'a', 'input') is BASE.weight


def test_rules_without_effect_are_named_unless_optional():
    rules = rules_of(
        {'name': 'a', 'num_bits': 8},
        {'name': 'typo', 'num_bits': 8},
        {'role': 'softmax', 'num_bits': 8, 'optional': True},
    )
    book = RuleBook(rules)
    assert list(book.unmatched()) == rules[:2]
    book.resolve(BASE.weight, 'weight', 'a', 'input')
    assert list(book.unmatched()) == [rules[1]]


@pytest.mark.parametrize(
    'rule',
    [
        {'role': 'query', 'weight': {'num_bits': 8}},
        {'role': 'query', 'activation': {'granularity': 'per_row', 'observer': 'minmax'}},
        {'role': 'query', 'activation': {'observer_args': {'bins': 7}}},
    ],
)
def test_a_rule_counts_where_its_settings_count(rule):
    rows = rules_of({'role': 'query', 'activation': {'granularity': 'per_row'}})
    book = RuleBook([*rows, *rules_of(rule)])
    book.resolve(BASE.activation, 'activation', 'a', 'query')
    assert book.hits == [1, int('granularity' in rule.get('activation', {}))]
    book.resolve(BASE.activation, 'activation', 'a', 'input')
    assert book.hits[0] == 1


def test_bits_of_a_rule_are_told_from_the_recipes():
    rules = rules_of({'name': 'a.*', 'weight': {'num_bits': 4}})
    assert sets_bits(rules, 'weight', 'a.b', 'input')
    assert not sets_bits(rules, 'activation', 'a.b', 'input')
    assert not sets_bits(rules, 'weight', 'b', 'input')


def test_roles_are_unique():
    assert len(set(ROLES)) == len(ROLES)
