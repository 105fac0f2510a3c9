# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import pytest

from gplq_mm.ops.backends.integer import kernels
from tests.helpers.tools import load_tool


def test_it_times_and_compares(capsys) -> None:
    if kernels.load()[0] is None:
        pytest.skip(kernels.load()[1])
    tool = load_tool('benchmarks/integer_kernel')
    assert tool.main(['--repetitions', '2', '--shape', '7', '33', '19']) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    by_name = {row[1]: row for row in rows}
    assert by_name['integer'][-1] == 'True' and by_name['integer'][0] == '7x33x19'
    assert float(by_name['float32'][4]) == 1.0
