# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Runs compared."""

from pathlib import Path

import pytest

pytest.importorskip('jinja2')
pytest.importorskip('vl_convert')

from gplq_mm.convert import resolve_recipe
from gplq_mm.pages.comparison_page import write_comparison
from tests.helpers.pages import read_page
from tests.helpers.reports import write_work_dir


def test_each_run_has_its_figures_and_curves(tmp_path: Path) -> None:
    first = write_work_dir(tmp_path / 'a' / 'run')
    stage2 = {'metrics': {'coco/bbox_mAP': 0.25}}
    recipe = resolve_recipe(dict(base='w4a4', weight=dict(num_bits=3)))
    second = write_work_dir(tmp_path / 'b' / 'run', recipe=recipe, stage2=stage2)
    page = read_page(write_comparison([first, second], tmp_path / 'x' / 'out.html'))
    assert page.open == []
    assert page.loads == []
    assert page.values['coco/bbox_mAP', 'run'] == 0.48
    assert page.values['coco/bbox_mAP', 'run (2)'] == 0.25
    assert 'weight.num_bits' in page.text
    assert '2 W3A4' in page.text
    loss = next(s for s in page.specs if s['encoding']['x']['title'] == 'iteration')
    rows = loss['data']['values']
    assert {row['series'] for row in rows} == {'run', 'run (2)'}
    assert len(rows) == 10
