# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The embedded script, and what happens without the packages that pages need."""

from pathlib import Path

import pytest

from gplq_mm.compat.cache_folder import cache_folder
from gplq_mm.pages import vega
from gplq_mm.pages.vega import MissingPackagesError, require_packages, vega_script


def test_script_is_stored_once_and_ends_no_script_element(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vl_convert = pytest.importorskip('vl_convert')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    calls = []

    def bundle(snippet: str) -> str:
        calls.append(snippet)
        return f'const end = "</script>"; {snippet}'

    monkeypatch.setattr(vl_convert, 'javascript_bundle', bundle)
    vega_script.cache_clear()
    try:
        first = vega_script()
        vega_script.cache_clear()
        assert vega_script() == first
    finally:
        vega_script.cache_clear()
    assert len(calls) == 1
    assert '</script' not in first
    assert 'window.vegaEmbed = vegaEmbed;' in first
    assert [path.suffix for path in (tmp_path / 'gplq_mm').iterdir()] == ['.js']


def test_missing_packages_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vega, 'is_installed', lambda name: name != 'vl_convert')
    with pytest.raises(MissingPackagesError, match='pip install vl-convert-python$'):
        require_packages()


def test_cache_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert cache_folder() == tmp_path / 'gplq_mm'
    monkeypatch.delenv('XDG_CACHE_HOME')
    assert cache_folder() == Path.home() / '.cache' / 'gplq_mm'
