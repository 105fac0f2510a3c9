# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Which format a command line names, and what is refused before long work."""

from argparse import Namespace
from pathlib import Path

import pytest

pytest.importorskip('mmengine')

from gplq_mm.integrations.mm.deployment import formats
from gplq_mm.integrations.mm.deployment.formats import (
    FORMATS,
    Format,
    check_output,
    choose_format,
)
from gplq_mm.integrations.mm.launch.errors import ConfigError


def arguments(out: str, name: str | None = None, fp16: bool = False) -> Namespace:
    return Namespace(out=out, format=name, fp16=fp16)


@pytest.mark.parametrize('name', FORMATS)
def test_the_suffix_or_the_name_chooses(name: str) -> None:
    row = FORMATS[name]
    assert choose_format(arguments(f'a.b{row.suffix}')) is row
    assert choose_format(arguments(f'a{row.suffix}', name)) is row


@pytest.mark.parametrize(
    ('out', 'name', 'message'),
    [
        ('x', None, r"the suffix '' names no format; write a name that ends with \.pth, "),
        ('x.bin', None, "the suffix '.bin' names no format"),
        ('x.pth', 'safetensors', r'names another format; write a name that ends with \.safetensor'),
    ],
)
def test_another_suffix_is_refused(out: str, name: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_format(arguments(out, name))


def test_an_argument_without_effect_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(formats.FORMATS, 'other', Format('.other', lambda *_: []))
    assert choose_format(arguments('x.other')).suffix == '.other'
    with pytest.raises(ConfigError, match='--fp16 has no effect on format other, only on pth, '):
        choose_format(arguments('x.other', fp16=True))


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Format('.other', lambda *_: [], packages=('sys', 'no_such_package'))
    monkeypatch.setitem(formats.FORMATS, 'other', row)
    with pytest.raises(ConfigError, match='write pip install no_such_package$'):
        choose_format(arguments('x.other'))


def test_output_is_checked_first(tmp_path: Path) -> None:
    source = tmp_path / 'gplq_final.pth'
    source.write_bytes(b'')
    check_output(tmp_path / 'new' / 'deeper' / 'x.pth', source)
    assert not (tmp_path / 'new').exists()
    for out, message in (
        (source, 'is the checkpoint itself'),
        (tmp_path / '.' / 'gplq_final.pth', 'is the checkpoint itself'),
        (tmp_path, 'is a folder'),
        (source / 'x.pth', 'is no folder'),
    ):
        with pytest.raises(ConfigError, match=message):
            check_output(out, source)


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats.os, 'access', lambda *_: False)  # root may write anywhere
    with pytest.raises(ConfigError, match='cannot be written; write a name in another folder'):
        check_output(tmp_path / 'x.pth', 'y.pth')
