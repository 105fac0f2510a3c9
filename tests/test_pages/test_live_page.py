# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The page of a run that goes on is cheap, and never a reason to stop."""

from pathlib import Path

import pytest

pytest.importorskip('jinja2')
pytest.importorskip('vl_convert')

from gplq_mm.pages import live_page, vega
from gplq_mm.pages.live_page import LEAST_SECONDS, LivePage
from tests.helpers.reports import write_work_dir


@pytest.fixture
def report(tmp_path: Path) -> Path:
    return write_work_dir(tmp_path / 'run')


def test_it_is_refreshed_now_and_then_and_at_the_end(
    report: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(live_page.time, 'monotonic', lambda: now[0])
    page, path = LivePage(), report.with_suffix('.html')
    assert page.refresh(report) == ''
    assert 'http-equiv="refresh"' in path.read_text()
    path.unlink()
    now[0] += LEAST_SECONDS / 2
    assert page.refresh(report) == ''
    assert not path.exists()
    now[0] += LEAST_SECONDS
    assert page.refresh(report) == ''
    assert path.exists()
    assert page.refresh(report, finished=True) == ''
    assert 'http-equiv="refresh"' not in path.read_text()


def test_a_missing_package_costs_one_line(report: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vega, 'is_installed', lambda name: name != 'jinja2')
    page = LivePage()
    assert page.refresh(report) == 'the HTML report needs: pip install Jinja2'
    assert page.refresh(report, finished=True) == ''
    assert not report.with_suffix('.html').exists()


def test_an_error_costs_one_line(report: Path) -> None:
    report.write_text('{"recipe"')
    page = LivePage()
    line = page.refresh(report)
    assert str(report) in line
    assert '\n' not in line
    assert page.refresh(report, finished=True) == ''
