# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The generated pages of docs/reference are what the code says."""

import re
from argparse import ArgumentParser
from pathlib import Path

import pytest

from gplq_mm.recipe import PRESETS, Recipe
from tests.helpers.tools import load_tool

pytest.importorskip('mmdet')
recipe_reference = load_tool('dev/write_recipe_reference')
tools_reference = load_tool('dev/write_tools_reference')


def test_the_recipe_page_is_up_to_date() -> None:
    stored = recipe_reference.TARGET.read_text(encoding='utf-8')
    assert stored == recipe_reference.render(), 'run: python tools/dev/write_recipe_reference.py'


def test_every_key_and_preset_is_in_it() -> None:
    text = recipe_reference.render()
    keys = [key for section in recipe_reference.SECTIONS.values() for key in list(section.keys())]
    for name in [*keys, *(name for name in PRESETS if not name.endswith('_v1'))]:
        assert f'| `{name}` |' in text, name
    assert set(Recipe.keys()) <= {*recipe_reference.SECTIONS, 'name', 'scope'}


def test_the_tools_pages_are_up_to_date() -> None:
    for name, text in tools_reference.render().items():
        stored = (tools_reference.FOLDER / name).read_text(encoding='utf-8')
        assert stored == text, 'run: python tools/dev/write_tools_reference.py'


def test_every_tool_is_in_them() -> None:
    folder = Path(tools_reference.ROOT) / 'tools'
    main = {path.stem for path in folder.glob('*.py') if 'ArgumentParser' in path.read_text()}
    named = re.findall(r'^## tools/(\w+)\.py$', tools_reference.render()['tools.md'], re.M)
    assert main - {'demo_picture'} == set(named)


def test_an_argument_is_a_row() -> None:
    parser = ArgumentParser()
    parser.add_argument('-o', '--out', default='x.pth', help='file | folder', required=True)
    parser.add_argument('--kind', choices=['a', 'b'], nargs='+')
    assert [tools_reference.row(action) for action in tools_reference.arguments(parser)] == [
        r'| `--out OUT` | file \| folder (required) (default: x.pth) |',
        '| `--kind {a,b} ...` |  |',
    ]
