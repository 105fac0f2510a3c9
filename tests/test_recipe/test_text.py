# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
from itertools import pairwise

import pytest
import yaml

from gplq_mm.recipe import as_recipe, resolve_recipe
from gplq_mm.recipe.text import recipe_text, yaml_value


@pytest.mark.parametrize(
    'value',
    [1e-6, 5e-06, 1.5e-7, 0.5, 3, True, None, "it's", 'auto', '*.attn.*', '', [0.9], {}, []],
)
def test_a_value_reads_back(value) -> None:
    found = yaml.safe_load(yaml_value(value))
    assert found == value and type(found) is type(value)


def test_a_changed_recipe_reads_back() -> None:
    changes = dict(
        rules=[dict(name='*.attn.*', weight=dict(num_bits=8))],
        mimic=[dict(type='logits', temperature=2.0), dict(type='feature', layer=None)],
        weight=dict(ptq=['repq', dict(type='gptq', asymmetric=True)]),
        stage2=dict(compensation=dict(type='qwt', blocks=['layers.0'])),
        gate=None,
    )
    recipe = as_recipe(changes)
    assert resolve_recipe(yaml.safe_load(recipe_text(recipe))) == recipe.as_dict()


def test_each_key_has_one_comment_on_the_line_before() -> None:
    lines = [line.strip() for line in recipe_text(as_recipe('w4a4')).splitlines()]
    after = [now for last, now in pairwise(lines) if last.startswith('#')]
    assert after and not any(line.startswith('#') for line in after)
    assert after.count("role: 'query'") == 1 and "role: 'key'" not in after
    assert lines[lines.index('# width of a code in bits') + 1] == 'num_bits: 4'
