# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import pytest

from gplq_mm.integrations.mm.run import progress


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    logged: list[str] = []
    clock = iter(range(0, 10_000, 2))
    monkeypatch.setattr(progress, 'print_log', lambda text, logger: logged.append(text))
    monkeypatch.setattr(progress.time, 'monotonic', lambda: next(clock))
    return logged


def run(total: int) -> None:
    log = progress.ProgressLog('work')
    for index in range(total):
        log(f'part{index}', index, total)


def test_few_parts_are_all_logged_with_the_remaining_time(lines: list[str]) -> None:
    run(3)
    assert lines == ['work: 1/3 part0', 'work: 2/3 part1, 8 s left', 'work: 3/3 part2, 3 s left']


def test_of_many_parts_some_are_logged_first_and_last_included(lines: list[str]) -> None:
    run(100)
    assert progress.LINES <= len(lines) <= progress.LINES + 2
    assert lines[0].startswith('work: 1/100 part0')
    assert lines[-1].startswith('work: 100/100 part99')


def test_only_the_main_process_logs(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, 'is_main_process', lambda: False)
    run(3)
    assert lines == []
