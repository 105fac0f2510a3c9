# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""`docs/which_preset.md` has the stored figures and names presets that exist."""

import re

import pytest

from gplq_mm.recipe import PRESETS
from tests.helpers.tools import load_tool

page = load_tool('dev/write_preset_page')
ROW = dict(model='m', recipe='ours', bits='w4a4', metric='accuracy/top1', fp32=90.0, stage2=89.0)


def test_the_page_is_up_to_date() -> None:
    stored = page.TARGET.read_text(encoding='utf-8')
    assert stored == page.render(), 'run: python tools/dev/write_preset_page.py'


def test_every_preset_is_in_it() -> None:
    named = set(re.findall(r'`((?:gplq_)?w\da\d(?:_paper)?|auto)`', page.render()))
    assert named == {name for name in PRESETS if not name.endswith('_v1')}


def test_a_loss_is_the_mean_over_seeds() -> None:
    rows = [ROW, {**ROW, 'stage2': 88.0}, {**ROW, 'bits': 'w3a3', 'stage2': 50.0}]
    assert page.loss(rows, 'm', 'ours', 'w4a4') == '1.5'
    with pytest.raises(ValueError, match='no row of m, ours, w2a2'):
        page.loss(rows, 'm', 'ours', 'w2a2')
