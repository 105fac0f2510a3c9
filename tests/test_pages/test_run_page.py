# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The page of a run says what its JSON says, and loads nothing."""

import json
from pathlib import Path

import pytest

pytest.importorskip('jinja2')
pytest.importorskip('vl_convert')

from gplq_mm.pages.run_files import read_run
from gplq_mm.pages.run_page import progress, run_page, tiles, write_run_page
from tests.helpers.pages import Page, read_page
from tests.helpers.reports import LAYERS, LONG_NAME, report_data, write_work_dir

MOST_BYTES = 5 * 2**20


@pytest.fixture(scope='module')
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_work_dir(tmp_path_factory.mktemp('runs') / 'my_run')


@pytest.fixture(scope='module')
def page(report: Path) -> Page:
    return read_page(write_run_page(report))


def test_page_is_whole_small_and_self_contained(report: Path, page: Page) -> None:
    path = report.with_suffix('.html')
    assert page.open == []
    assert page.loads == []
    assert path.stat().st_size < MOST_BYTES
    assert "default-src 'none'" in path.read_text()
    assert not list(report.parent.glob('.*.tmp'))


def test_figures_are_those_of_the_json(report: Path, page: Page) -> None:
    data = json.loads(report.read_text())
    for stage in ('fp32', 'stage1', 'stage2'):
        given = data[stage]['metrics']
        assert page.values['coco/bbox_mAP', stage] == given['coco/bbox_mAP']
        assert page.values['cat', stage] == given['coco/cat_precision']
        assert page.values['bit operations (G)', stage] == data[stage]['bops'] / 1e9
    assert page.values['packed file (MiB)', 'stage2'] == 2.0
    assert page.values['mean bits of weights', 'stage2'] == 4.1
    assert 'coco/bbox_mAP_l' not in page.text  # no object counts for it


def test_charts_hold_curves_scales_layers_and_grids(page: Page) -> None:
    rows = [spec.get('data', {}).get('values') for spec in page.specs]
    loss = next(values for values in rows if values)
    assert [(row['x'], row['y']) for row in loss] == [(i, 2.0 / i) for i in range(1, 6)]
    grids = [spec for spec in page.specs if 'layer' in spec and not spec.get('data')]
    assert len(grids) == 2
    codes = [row['x'] for row in grids[0]['layer'][1]['data']['values']]
    assert codes == list(range(-8, 8))
    shares = [row['y'] for row in grids[0]['layer'][0]['data']['values']]
    assert sum(shares) == pytest.approx(100)
    ratios = next(v for v in rows if v and v[0].get('series') == 'weight' and v[0]['y'] == 12)
    assert {row['series'] for row in ratios} == {'weight', 'input', 'output'}
    assert {row['name'] for row in ratios} == set(LAYERS)


def test_vega_lite_compiles_every_chart(page: Page) -> None:
    import vl_convert

    kinds = {}  # one chart of each form: only their data differ
    for spec in page.specs:
        form = {key: value for key, value in spec.items() if key not in ('data', 'layer')}
        kinds.setdefault(json.dumps([form, len(spec.get('layer', ()))]), spec)
    assert len(kinds) >= 5
    for spec in kinds.values():
        assert vl_convert.vegalite_to_vega(spec)['marks']


def test_text_has_warnings_command_recipe_and_what_stays_float(page: Page) -> None:
    assert page.text.count('<b>the learning rate</b> is shared') == 1  # escaped, and once
    assert 'FileClient' not in page.text
    for part in ('a note of stage 2', 'python tools/train.py', 'num_bits: 4', LONG_NAME):
        assert part in page.text
    assert 'float: no handler for x.Y' in page.text
    assert '1 of 5 validation images' in page.text


def test_tiles_say_what_was_lost_at_a_glance() -> None:
    found = {tile['title']: tile for tile in tiles(report_data())}
    metric = found['coco/bbox_mAP']
    assert (metric['value'], metric['was'], metric['change']) == ('0.48', '0.5', '-0.02')
    assert metric['verdict'] == 'worse'
    assert found['packed file (MiB)']['change'] == '4.00x less'
    assert found['latency (ms)']['change'] == '3.00x less'
    assert found['mean bits']['value'] == 'W4.10 A4.20'


def test_a_run_that_goes_on_reloads_and_says_where_it_is(tmp_path: Path) -> None:
    data = report_data()
    begun = {key: data[key] for key in ('recipe', 'coverage', 'versions', 'seed')}
    path = tmp_path / 'gplq_report.json'
    path.write_text(json.dumps({**begun, 'calibration': {'quantizers': 12}}))
    text = run_page(read_run(path), running=True)
    assert 'http-equiv="refresh"' in text
    assert 'No score yet' in text
    assert dict(progress(json.loads(path.read_text())))['calibration'] is True
    assert dict(progress(data)) == dict.fromkeys(dict(progress(data)), True)
    assert 'http-equiv="refresh"' not in run_page(read_run(path))


def test_a_recipe_of_another_version_is_shown_as_stored(tmp_path: Path) -> None:
    recipe = {**report_data()['recipe'], 'key_of_the_future': 1}
    report = write_work_dir(tmp_path / 'run', recipe=recipe)
    assert '"key_of_the_future": 1' in read_page(write_run_page(report)).text
