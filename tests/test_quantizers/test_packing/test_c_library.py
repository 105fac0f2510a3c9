# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Only what was compiled here is loaded."""

import os
import shutil
import stat
from pathlib import Path

import pytest

from gplq_mm.quantizers.packing.c_library import LibraryError, load_functions, load_library

pytestmark = pytest.mark.skipif(shutil.which('gcc') is None, reason='no compiler')


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where libraries are stored; not there yet."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.delenv('GPLQ_CPU_KERNELS', raising=False)
    return tmp_path / 'cache' / 'gplq_mm'


def source(folder: Path, answer: int) -> Path:
    path = folder / 'answer.c'
    path.write_text(f'int answer(void) {{ return {answer}; }}\n')
    return path


def stored(cache: Path) -> Path:
    (path,) = cache.iterdir()
    return path


def test_the_folder_is_closed_to_others(cache: Path, tmp_path: Path) -> None:
    cache.mkdir(parents=True, mode=0o755)
    assert load_library(source(tmp_path, 1)).answer() == 1
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_a_whole_library_is_compiled_once(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_library(source(tmp_path, 1))
    before = stored(cache).stat().st_mtime_ns
    monkeypatch.setattr('subprocess.run', lambda *_, **__: pytest.fail('compiled again'))
    assert load_library(source(tmp_path, 1)).answer() == 1
    assert stored(cache).stat().st_mtime_ns == before


@pytest.mark.parametrize('damage', ['truncated', 'planted'])
def test_another_content_is_never_loaded(cache: Path, tmp_path: Path, damage: str) -> None:
    load_library(source(tmp_path, 1))
    whole = stored(cache)
    content = whole.read_bytes()
    load_library(source(tmp_path, 2))
    (other,) = set(cache.iterdir()) - {whole}
    planted = content[: len(content) // 2] if damage == 'truncated' else other.read_bytes()
    whole.unlink()  # the loaded file's pages stay as they were
    whole.write_bytes(planted)
    assert load_library(source(tmp_path, 1)).answer() == 1
    assert whole.read_bytes() == content


def test_the_folder_of_another_user_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir(parents=True)
    me = os.getuid()
    monkeypatch.setattr(os, 'getuid', lambda: me + 1)
    with pytest.raises(LibraryError, match=f'belongs to user {me}, .*XDG_CACHE_HOME'):
        load_library(source(tmp_path, 1))
    functions, reason = load_functions(source(tmp_path, 1), lambda library: library.answer)
    assert functions is None
    assert 'belongs to user' in reason
    assert not list(cache.iterdir())
