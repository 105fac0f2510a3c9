# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip('rich', reason='shows progress')

TOOLS = Path(__file__).resolve().parents[2] / 'tools'
sys.path.insert(0, str(TOOLS))
try:
    from demo_progress import Demo, Part, Phase, as_time
finally:
    sys.path.remove(str(TOOLS))

TRAIN = Part(r'Epoch \[(?P<epoch>\d+)\]\[(?P<done>\d+)/(?P<total>\d+)\]', 0.5, epochs=4)
SCORE = Part(r'scored (?P<done>\d+)/(?P<total>\d+)', 0.5)


@pytest.mark.parametrize(
    ('line', 'fraction'),
    [('Epoch [1][5/10]', 0.0625), ('Epoch [4][10/10]', 0.5), ('scored 1/2', 0.75), ('x', None)],
)
def test_fraction_of_a_phase(line, fraction):
    assert Phase('a phase', (TRAIN, SCORE)).fraction(line) == fraction


def test_duration():
    assert [as_time(seconds) for seconds in (0.4, 59.6, 160)] == ['0 s', '1 min 00 s', '2 min 40 s']


def test_a_line_per_phase_and_the_output_in_the_log(tmp_path, capsys):
    demo = Demo(3, tmp_path / 'a' / 'demo.log')
    demo.skip('data', 'there')
    phases = [Phase('one', (SCORE,)), Phase('two', begins='second')]
    demo.run(['-c', 'print("scored 1/2\\nthe second begins\\nend")'], phases)
    lines = capsys.readouterr().out.splitlines()
    assert [re.sub(r'\d+ s$', 'T', line) for line in lines] == [
        '[1/3] data ... there',
        '[2/3] one ... T',
        '[3/3] two ... T',
    ]
    log = demo.log.read_text().splitlines()
    assert log[0].startswith('$ python -c ')
    assert log[-3:] == ['scored 1/2', 'the second begins', 'end']


def test_failing_command_stops_with_phase_code_command_and_log(tmp_path, capsys):
    demo = Demo(5, tmp_path / 'demo.log')
    code = 'import sys; print("the cause"); sys.exit(7)'
    with pytest.raises(
        SystemExit, match=r'^demo: step 1/5 failed with exit code 7: python -c '
    ) as e:
        demo.run(['-c', code], [Phase('one'), Phase('two', begins='second')])
    assert str(demo.log) in str(e.value)
    out = capsys.readouterr().out
    assert 'the cause' in out
    assert '[1/5]' not in out
