# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Freed memory is used again: few page faults in steps that take and free the same tensors."""

import pytest

from gplq_mm.integrations.mm.launch.cpu_memory import USERS_CHOICE, keep_freed_memory
from tests.helpers.tiny_projects import REPOSITORY, run_ok

FAULTS = """
import resource, torch
from gplq_mm.integrations.mm.launch.cpu_memory import keep_freed_memory

def faults():
    for step in range(22):  # aligned blocks fit into freed ones after several steps only
        if step == 20:
            start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.ones(1 << 24) for _ in range(2)]  # 64 MiB each
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start

print('FAULTS', faults(), int(keep_freed_memory()), faults())
"""


def test_tensors_of_later_steps_take_the_pages_of_earlier_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in USERS_CHOICE:
        monkeypatch.delenv(name, raising=False)
    output = run_ok('-c', FAULTS, cwd=REPOSITORY)
    before, is_kept, after = map(int, output.split('FAULTS')[1].split()[:3])
    if not is_kept:
        pytest.skip('not glibc, or an accelerator is there')
    assert before > 100 * after


@pytest.mark.parametrize('name', USERS_CHOICE)
def test_the_users_choice_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, '131072')
    assert not keep_freed_memory()


def test_nothing_is_done_where_an_accelerator_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    assert not keep_freed_memory()
