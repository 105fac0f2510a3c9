# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""A compiler in front of the compiler: same objects, the header parsed once."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tools.dev.precompiled_header import HEADER, compile_file, language_flags, write_launcher

CXX = shutil.which('c++') or shutil.which('g++')
needs_compiler = pytest.mark.skipif(CXX is None, reason='needs a C++ compiler')
OTHER = '#!/bin/sh\ncase "$*" in *c++-header*|*-include*) exit 1;; esac\nexec {} "$@"\n'


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A source file that includes the header first, as mmcv's do."""
    (tmp_path / 'include').mkdir()
    text = '#include <vector>\ninline int one() { return 1; }\n'
    guarded = f'#ifndef HELPER\n#define HELPER\n{text}#endif\n'
    (tmp_path / 'include' / HEADER).write_text(guarded)
    path = tmp_path / 'operator.cpp'
    path.write_text(f'#include "{HEADER}"\nint f(std::vector<int> a) {{ return a[0] + one(); }}\n')
    return path


def arguments(source: Path, out: Path) -> list[str]:
    """The arguments with which torch's build calls the compiler."""
    flags = ['-MMD', '-MF', f'{out}.d', '-O2', f'-I{source.parent / "include"}', '-c']
    return [*flags, '-c', str(source), '-o', str(out), '-std=c++17']


def test_flags_are_those_without_input_and_outputs() -> None:
    argv = arguments(Path('/x/a.cpp'), Path('/x/a.o'))
    assert language_flags(argv) == ['-O2', '-I/x/include', '-std=c++17']


@pytest.mark.parametrize(
    'argv', [['-shared', 'a.o', '-o', 'a.so'], ['-c', 'a.cpp', 'b.cpp'], ['--version'], ['a.cpp']]
)
def test_other_calls_are_passed_on(argv: list[str]) -> None:
    assert language_flags(argv) is None


@needs_compiler
def test_object_is_the_same_and_the_header_is_read_precompiled(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    plain, fast = tmp_path / 'plain.o', tmp_path / 'fast.o'
    subprocess.run([CXX, *arguments(source, plain)], check=True)
    assert compile_file([CXX], tmp_path / 'headers', arguments(source, fast)) == 0
    assert fast.read_bytes() == plain.read_bytes()
    capfd.readouterr()
    # -H prints the files that are read; it is another flag, hence another precompiled header
    assert compile_file([CXX], tmp_path / 'headers', ['-H', *arguments(source, fast)]) == 0
    assert f'{HEADER}.gch' in capfd.readouterr().err
    assert len(list((tmp_path / 'headers').glob(f'*/{HEADER}.gch'))) == 2


@needs_compiler
def test_compiler_without_precompiled_headers_compiles_all_the_same(
    source: Path, tmp_path: Path
) -> None:
    other = tmp_path / 'other'
    other.write_text(OTHER.format(CXX))
    other.chmod(0o755)
    out = tmp_path / 'a.o'
    assert compile_file([str(other)], tmp_path / 'headers', arguments(source, out)) == 0
    assert out.stat().st_size
    assert not list((tmp_path / 'headers').glob('*/*.gch'))


@needs_compiler
def test_error_in_the_source_is_an_error(source: Path, tmp_path: Path) -> None:
    source.write_text(f'#include "{HEADER}"\nint f() {{ return nothing; }}\n')
    assert compile_file([CXX], tmp_path / 'headers', arguments(source, tmp_path / 'a.o')) != 0


@needs_compiler
def test_launcher_stands_for_the_compiler(source: Path, tmp_path: Path) -> None:
    launcher = write_launcher(tmp_path, CXX)
    assert launcher.name == Path(CXX).name
    versions = [
        subprocess.run([path, '--version'], capture_output=True, text=True, check=True).stdout
        for path in (launcher, CXX)
    ]
    assert versions[0] == versions[1]
    subprocess.run([launcher, *arguments(source, tmp_path / 'a.o')], check=True)
    assert (tmp_path / 'a.o').exists()
    assert list((tmp_path / 'headers').glob(f'*/{HEADER}.gch'))
