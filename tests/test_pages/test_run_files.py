# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""What is read from a work dir."""

from pathlib import Path

import pytest

from gplq_mm.pages.run_files import MOST_WARNINGS, find_report, read_run
from tests.helpers.reports import write_work_dir


def test_a_work_dir_is_read(tmp_path: Path) -> None:
    run = read_run(write_work_dir(tmp_path / 'my_run'))
    assert run.name == 'my_run'
    assert [line['iter'] for line in run.scalars] == [1, 2, 3, 4, 5]  # no scores, no broken line
    assert run.warnings == ['<b>the learning rate</b> is shared']
    assert run.examples['compared'] == 5


def test_a_report_of_another_name_has_that_name(tmp_path: Path) -> None:
    report = write_work_dir(tmp_path / 'my_run')
    other = report.rename(report.with_name('gplq_final_mse_report.json'))
    run = read_run(other)
    assert run.name == 'gplq_final_mse_report'
    assert run.examples == {}


def test_logs_of_an_earlier_run_in_the_work_dir_are_left_out(tmp_path: Path) -> None:
    report = write_work_dir(tmp_path / 'my_run', logs=['20260102_030405', '20260102_040000'])
    earlier = report.parent / '20250101_000000'
    (earlier / 'vis_data').mkdir(parents=True)
    (earlier / 'vis_data' / 'scalars.json').write_text('{"loss": 9.0, "iter": 99}')
    (earlier / 'x.log').write_text('2025/01/01 00:00:00 - mmengine - WARNING - old')
    run = read_run(report)
    assert [line['iter'] for line in run.scalars] == [1, 2, 3, 4, 5]
    assert run.warnings == ['<b>the learning rate</b> is shared']


def test_warnings_are_bounded(tmp_path: Path) -> None:
    report = write_work_dir(tmp_path / 'my_run')
    lines = [f'2026/01/02 03:04:05 - mmengine - ERROR - number {i}' for i in range(50)]
    (report.parent / '20260102_030405' / 'more.log').write_text('\n'.join(lines))
    warnings = read_run(report).warnings
    assert len(warnings) == MOST_WARNINGS
    assert warnings[-1] == 'ERROR: number 49'


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match='no gplq_report.json; give the work dir'):
        find_report(tmp_path)
    report = tmp_path / 'gplq_report.json'
    report.write_text('[')
    with pytest.raises(ValueError, match='is damaged'):
        read_run(find_report(report))
    report.write_text('{"recipe": {}}')
    with pytest.raises(ValueError, match='no report of a GPLQ run'):
        read_run(find_report(tmp_path))
