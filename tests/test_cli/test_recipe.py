# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
import json

import pytest
import yaml

from gplq_mm.__main__ import main
from gplq_mm.recipe import PRESETS, resolve_recipe


def printed(capsys: pytest.CaptureFixture, *words: str) -> str:
    assert main(['recipe', *words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize('name', PRESETS)
def test_what_is_printed_reads_back_as_the_preset(name: str, capsys) -> None:
    assert resolve_recipe(yaml.safe_load(printed(capsys, name))) == PRESETS[name]
    scope: dict = {}
    exec(printed(capsys, name, '--format', 'python'), scope)
    assert resolve_recipe(scope['recipe']) == PRESETS[name]


def test_the_schema_is_json(capsys) -> None:
    schema = json.loads(printed(capsys, '--json-schema'))
    assert schema['anyOf'][0] == {'enum': sorted(PRESETS)}


def test_an_unknown_preset_is_one_line(capsys) -> None:
    with pytest.raises(SystemExit):
        main(['recipe', 'w4a44'])
    assert "did you mean 'w4a4'?" in capsys.readouterr().err
