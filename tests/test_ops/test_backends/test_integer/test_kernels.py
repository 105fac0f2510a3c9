# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import platform
import shutil
import subprocess

import pytest
import torch

from gplq_mm.ops.backends.integer import kernels
from gplq_mm.ops.backends.integer.kernels import Layout, completed, layout, workspace
from gplq_mm.quantizers.packing import c_library


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """No library loaded, an empty cache."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    kernels.load.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    kernels.load.cache_clear()


def test_without_a_compiler_there_are_no_kernels(fresh) -> None:
    fresh.setenv('CC', 'no-such-compiler')
    loaded, reason = kernels.load()
    assert loaded is None and 'no-such-compiler' in reason


def test_switch(fresh) -> None:
    fresh.setenv(c_library.SWITCH, '0')
    assert kernels.load() == (None, 'GPLQ_CPU_KERNELS=0')


def test_wrong_sums_are_found(fresh) -> None:
    if kernels.load()[0] is None:
        pytest.skip(kernels.load()[1])
    kernels.load.cache_clear()
    fresh.setattr(kernels, 'layout', lambda left, right, depth: Layout(0, -(-depth // 4), 1 << 20))
    loaded, reason = kernels.load()
    assert loaded is None and 'wrong sums' in reason


def test_portable_code_gives_the_same(fresh) -> None:
    """The C of processors without AVX2."""
    if kernels.load()[0] is None:
        pytest.skip(kernels.load()[1])
    fresh.setattr(c_library, '_FLAGS', [*c_library._FLAGS, '-mno-avx2'])
    kernels.load.cache_clear()
    assert kernels.load()[1] == 'kernels compiled from C'  # worst-case codes are exact
    torch.manual_seed(0)
    weight = torch.randint(-8, 8, (21, 70))
    loaded = kernels.load()[0]
    assert loaded is not None
    for form in (Layout(0, 18, 136), Layout(1, 35, 1)):
        matrix = loaded.arrange(weight.float(), torch.ones(70), form)
        assert torch.equal(matrix.sums, weight.sum(1).int())


@pytest.mark.parametrize('processor', ['icelake-server', 'alderlake'])
@pytest.mark.skipif(platform.machine() != 'x86_64', reason='code for other processors')
def test_code_for_vnni_compiles(processor, tmp_path) -> None:
    """It runs only where the processor has the instruction, after the check at load."""
    compiler = shutil.which('gcc')
    if compiler is None:
        pytest.skip('no gcc')
    flags = [f for f in c_library._FLAGS if not f.startswith('-march')]
    command = [compiler, *flags, f'-march={processor}', '-S', '-o', '-', kernels._SOURCE]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True)
    assert 'vpdpbusd' in done.stdout and 'vpmaddubsw' not in done.stdout


@pytest.mark.parametrize(
    ('codes', 'expected'),
    [
        ((15, 8, 384), Layout(0, 96, 136)),
        ((255, 127, 10), Layout(1, 5, 1)),
        ((255, 16, 9), Layout(0, 3, 4)),
        ((16384, 15, 8737), Layout(1, 4369, 1)),
    ],
)
def test_layout(codes, expected) -> None:
    assert layout(*codes) == expected


@pytest.mark.parametrize(('codes', 'reason'), [((16384, 15, 8739), '32'), ((40000, 1, 2), '16')])
def test_no_layout(codes, reason) -> None:
    found = layout(*codes)
    assert isinstance(found, str) and f'{reason} bits' in found


def test_workspace_grows() -> None:
    small = workspace(10).value
    assert workspace(5).value == small
    workspace(1 << 20)
    assert len(kernels._WORKSPACE.buffer) >= 1 << 20


def test_status() -> None:
    assert completed(0) and not completed(1)
    with pytest.raises(MemoryError, match='no memory'):
        completed(2)
