# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
from __future__ import annotations

from types import ModuleType

import pytest

from gplq_mm.compat import installed
from gplq_mm.compat.installed import (
    CLASHES,
    MISSING,
    OK,
    Component,
    check_versions,
    inspect_component,
)

ASSERTION = (
    'MMCV==2.2.0 is used but incompatible. Please install mmcv>=2.0.0rc4, <2.2.0.',
    "MMCV_WITH_OPS=1 pip install --no-build-isolation 'mmcv>=2.0.0rc4,<2.2.0'",
)


def fail(module: ModuleType) -> str:
    """A probe that meets mmdet's assertion."""
    raise AssertionError(ASSERTION[0])


FITS = Component('json', 'pip install json', lambda module: 'fine')
CLASH = Component('csv', 'pip install csv', fail)
ABSENT = Component('no_such_module', 'pip install no-such-module')


@pytest.mark.parametrize(
    ('component', 'state', 'why', 'mend'),
    [
        (FITS, OK, 'fine', ''),
        (CLASH, CLASHES, f'AssertionError: {ASSERTION[0]}', ASSERTION[1]),
        (ABSENT, MISSING, 'not installed', 'pip install no-such-module'),
    ],
)
def test_inspect_component(component: Component, state: str, why: str, mend: str) -> None:
    finding = inspect_component(component)
    assert (finding.name, finding.state) == (component.name, state)
    assert (finding.why, finding.mend) == (why, mend)


@pytest.mark.parametrize(
    ('message', 'line'),
    [
        ASSERTION,
        ('Please install mmengine>=0.7.1, <1.0.0.', "pip install 'mmengine>=0.7.1,<1.0.0'"),
        ('undefined symbol', 'the default'),
    ],
)
def test_repair_command(message: str, line: str) -> None:
    assert installed.repair_command(message, 'the default') == line


def test_models_that_fail_beside_transformers_are_told_before_any_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def import_module(name: str) -> ModuleType:
        if name == 'mmpretrain.models':
            raise TypeError('NoneType takes no arguments')
        return ModuleType(name)

    monkeypatch.setattr(installed, 'is_installed', lambda name: True)
    monkeypatch.setattr(installed, 'import_module', import_module)
    (component,) = (c for c in installed.COMPONENTS if c.name == 'mmpretrain')
    finding = inspect_component(component)
    assert finding.state == CLASHES
    assert 'with transformers' in finding.why
    assert finding.mend == "pip install 'transformers>=4.28,<4.50'"


def test_missing_is_an_error_only_where_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, 'COMPONENTS', (FITS, ABSENT))
    check_versions()
    check_versions('json')
    with pytest.raises(ImportError, match='fix: pip install no-such-module'):
        check_versions('no_such_module')


def test_clash_is_always_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, 'COMPONENTS', (FITS, CLASH, ABSENT))
    with pytest.raises(ImportError) as error:
        check_versions('no_such_module')
    text = str(error.value)
    assert ASSERTION[0] in text
    assert f'fix: {ASSERTION[1]}' in text
    assert 'fix: pip install no-such-module' in text
    assert 'json' not in text


def test_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\['mmdett'\].*allowed.*'mmdet'"):
        check_versions('mmdett')


def test_is_installed_does_not_import(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'gplq_explosive.py').write_text('raise SystemExit', encoding='utf-8')
    monkeypatch.syspath_prepend(str(tmp_path))
    assert installed.is_installed('gplq_explosive')
    assert not installed.is_installed('no_such_module')
