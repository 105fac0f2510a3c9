# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""`python -m gplq_mm report`."""

from pathlib import Path

import pytest

pytest.importorskip('jinja2')
pytest.importorskip('vl_convert')

from gplq_mm.__main__ import main
from tests.helpers.pages import read_page
from tests.helpers.reports import write_work_dir


def test_one_work_dir_gets_its_page(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    report = write_work_dir(tmp_path / 'run')
    page = report.with_suffix('.html')
    assert main(['report', str(report.parent)]) == 0
    assert capsys.readouterr().out == f'wrote {page}\n'
    assert read_page(page).values['coco/bbox_mAP', 'stage2'] == 0.48


def test_several_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ('a', 'b'):
        write_work_dir(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert main(['report', 'a', 'b/gplq_report.json']) == 0
    assert read_page(tmp_path / 'gplq_comparison.html').values['coco/bbox_mAP', 'b'] == 0.48
    assert main(['report', 'a', 'b', '-o', 'new/x.html']) == 0
    assert (tmp_path / 'new' / 'x.html').is_file()


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['nowhere'], 'give the work dir of a GPLQ run'),
        (['run', '-o', 'x.png'], 'write -o x.png.html'),
    ],
)
def test_mistakes_cost_one_line(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    write_work_dir(tmp_path / 'run')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(['report', *words])
    error = capsys.readouterr().err
    assert message in error
    assert error.count('\n') == 1
