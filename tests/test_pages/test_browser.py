# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The pages in Chromium: every chart is drawn, nothing overflows, nothing is requested."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip('jinja2')
pytest.importorskip('vl_convert')
pytest.importorskip('playwright')

from playwright.sync_api import sync_playwright

from gplq_mm.pages.comparison_page import write_comparison
from gplq_mm.pages.run_page import write_run_page
from tests.helpers.reports import write_work_dir

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'chrome'))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason='no Chromium (Debian, Ubuntu: apt-get install chromium)'
)
ALL_DRAWN = "document.querySelectorAll('.vega:not(.drawn)').length === 0"
OVERFLOW = 'document.documentElement.scrollWidth - document.documentElement.clientWidth'
# what is wider than its own box and cannot be scrolled there
CUT_CHARTS = """[...document.querySelectorAll('.vega svg')].filter(
  svg => svg.getBoundingClientRect().right > svg.closest('.vega').getBoundingClientRect().right + 1
).length"""


@pytest.fixture(scope='module')
def browser() -> Iterator[Any]:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        yield browser
        browser.close()


@pytest.fixture(scope='module')
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp('runs')
    reports = [write_work_dir(folder / name) for name in ('a_run', 'another_run')]
    compared = write_comparison(reports, folder / 'compared.html')
    return {'run': write_run_page(reports[0]), 'comparison': compared}


@pytest.mark.parametrize('name', ['run', 'comparison'])
@pytest.mark.parametrize(('width', 'scheme'), [(1280, 'light'), (400, 'dark')])
def test_page_is_drawn_and_fits(
    browser: Any, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    context = browser.new_context(viewport={'width': width, 'height': 900}, color_scheme=scheme)
    page = context.new_page()
    problems: list[str] = []
    requests: list[str] = []
    page.on('pageerror', lambda error: problems.append(str(error)))
    page.on('console', lambda m: problems.append(m.text) if m.type == 'error' else None)
    page.on('request', lambda request: requests.append(request.url))
    page.goto(pages[name].as_uri())
    page.wait_for_function(ALL_DRAWN)
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert page.evaluate(OVERFLOW) <= 0
    assert page.evaluate(CUT_CHARTS) == 0
    assert page.locator('.vega svg').count() == page.locator('.vega').count() > 3
    background = page.evaluate('getComputedStyle(document.body).backgroundColor')
    assert (background == 'rgb(255, 255, 255)') is (scheme == 'light')
    assert problems == []
    assert requests == [pages[name].as_uri()]
    context.close()


def test_links_and_folded_parts_work(browser: Any, pages: dict[str, Path]) -> None:
    size = {'width': 1280, 'height': 900}
    page = browser.new_page(viewport=size, reduced_motion='reduce')
    page.goto(pages['run'].as_uri())
    for link in page.locator('nav a').all():
        link.click()
        target = link.get_attribute('href')
        page.wait_for_function(
            f"document.querySelector('{target}').getBoundingClientRect().top < innerHeight"
        )
    recipe = page.locator('details', has=page.locator('pre'))
    assert not recipe.locator('pre').is_visible()
    recipe.locator('summary').click()
    assert recipe.locator('pre').is_visible()
    assert page.locator('.box.lost').is_visible()
    page.locator('#layers .vega path[aria-label]').first.hover()
    page.close()
