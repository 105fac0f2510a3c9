# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import signal
import sys

import pytest

from gplq_mm.integrations.mm.launch.errors import run_tool

STOPS = [(signal.SIGINT, 130, 'Ctrl-C'), (signal.SIGTERM, 143, 'SIGTERM')]


@pytest.mark.parametrize(('number', 'code', 'name'), STOPS)
@pytest.mark.parametrize(
    ('words', 'resume', 'says'),
    [
        ('a.py c.py', '--resume', 'go on with: python a.py c.py --resume'),
        (
            'a.py c.py --resume x.pth --amp',
            '--resume',
            'go on with: python a.py c.py --amp --resume',
        ),
        ('a.py c.py --resume', '--resume', 'go on with: python a.py c.py --resume'),
        ('a.py c.py', '', 'start again with: python a.py c.py'),
    ],
)
def test_an_interruption_is_one_line_with_the_way_to_go_on(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
    name: str,
    words: str,
    resume: str,
    says: str,
) -> None:
    monkeypatch.setattr(sys, 'argv', words.split())
    former = signal.getsignal(signal.SIGTERM)
    assert run_tool(lambda: signal.raise_signal(number), resume) == code
    assert capfd.readouterr().err == f'stopped by {name}; {says}\n'
    assert signal.getsignal(signal.SIGTERM) == former
