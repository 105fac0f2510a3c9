# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""`python -m gplq_mm inspect` on stored checkpoints, and its refusals."""

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip('mmdet')
pytest.importorskip('mmpretrain')

from gplq_mm.__main__ import main
from gplq_mm.cli.inspect import RED, Row, text_of, wants_colours
from gplq_mm.integrations.onnx.packages import Precision
from tests.helpers.checkpoint_fixtures import unpacked


@pytest.mark.parametrize('name', ['vit', 'detector'])
def test_lists_the_operations_of_a_finished_checkpoint(name, tmp_path, capsys) -> None:
    path = str(unpacked(f'{name}_final', tmp_path))
    assert main(['inspect', path, '--strict']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith('none runs in float')
    assert sum('int4 x' in line for line in lines[:-1]) > 5
    if name == 'vit':
        assert not any('not called' in line for line in lines)


def test_strict_fails_for_a_float_operation(monkeypatch, tmp_path, capsys) -> None:
    path = tmp_path / 'a.onnx'
    path.touch()
    entries = [
        Precision('a', 'MatMulInteger', 'uint8 x int8'),
        Precision('b', 'MatMul', 'float32 x float32'),
    ]
    module = ModuleType('gplq_mm.integrations.onnx')
    module.precisions = lambda path: entries
    monkeypatch.setitem(sys.modules, 'gplq_mm.integrations.onnx', module)
    assert main(['inspect', str(path)]) == 0
    assert main(['inspect', str(path), '--strict']) == 1
    assert '1 operations of the scope run in float' in capsys.readouterr().out
    entries[1] = entries[1]._replace(outside='outside the scope')
    assert main(['inspect', str(path), '--strict']) == 0
    assert 'outside the scope' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('names', 'message'),
    [
        (['missing.onnx'], 'no file at'),
        (['config.py'], 'write inspect .*config.py gplq_final.pth'),
        (['a.onnx', 'b.pth'], 'checkpoint has no effect'),
        (['b.pth', 'config.py'], 'write inspect FILE.onnx'),
        (['a.onnx', '--size', '8'], 'size has no effect'),
        (['b.pth'], 'cannot be read as a checkpoint'),
    ],
)
def test_mistakes_are_one_line(names, message, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ('config.py', 'a.onnx', 'b.pth'):
        Path(name).write_text('x')
    with pytest.raises(SystemExit) as stop:
        main(['inspect', *names])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count('\n') == 1
    assert re.search(message, error), error


def test_float_operations_are_red_in_a_terminal() -> None:
    rows = [Row('a', 'linear', 'float32', 'reference', True), Row('b', 'linear', 'int4', '', False)]
    assert text_of(rows, colours=True).count(RED) == 1
    plain = text_of(rows, colours=False)
    assert RED not in plain and plain.count('FLOAT') == 1
    terminal = SimpleNamespace(isatty=lambda: True)
    assert wants_colours(terminal, {}) and not wants_colours(terminal, {'NO_COLOR': ''})
