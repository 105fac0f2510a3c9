# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The layout: folders that can be read at a glance, names that say one thing, documents that fit.

What may import what is in `test_import_rules.py`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest

import gplq_mm

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'gplq_mm'
DESIGN = ROOT / 'docs' / 'design.md'
MOST_MODULES = 12
MOST_STEPS = 10
# Names that come twice because the folder says the difference.
SHARED_NAMES = {
    'attention': 'handlers of one library each; the packed backend of attention',
    'conv': 'the operation; its integer backend',
    'doctor': '`python -m gplq_mm.doctor` is short for the command in `cli`',
    'feed_forward': 'the operation; its packed backend',
    'heads': 'handlers of one library each',
    'linear': 'the operation; its packed and its integer backend',
    'matmul': 'the operation; its packed and its integer backend',
    'recipe': 'the recipe; the command that prints it',
    'report': 'the JSON report and its table; the command that draws its page',
    'window': 'handlers of one library each; the window attention that they share',
}


def modules() -> list[Path]:
    """Files of the package, `__init__` left out."""
    paths = (path for path in PACKAGE.rglob('*.py') if '.mim' not in path.parts)
    return sorted(path for path in paths if path.name != '__init__.py')


def test_a_folder_holds_few_modules() -> None:
    folders = defaultdict(list)
    for path in modules():
        folders[str(path.parent.relative_to(ROOT))].append(path.stem)
    crowded = {folder: names for folder, names in folders.items() if len(names) > MOST_MODULES}
    assert not crowded, f'{MOST_MODULES} modules per folder at most; split: {crowded}'


def test_a_file_name_comes_once() -> None:
    places = defaultdict(list)
    for path in modules():
        places[path.stem].append(str(path.relative_to(PACKAGE)))
    twice = {name for name, paths in places.items() if len(paths) > 1}
    new = {name: places[name] for name in twice - SHARED_NAMES.keys()}
    assert not new, f'choose another name, or say in SHARED_NAMES what differs: {new}'
    assert not SHARED_NAMES.keys() - twice, 'SHARED_NAMES has names that come once'


def test_no_public_name_is_a_subpackage() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if (path / '__init__.py').exists()}
    both = folders & set(gplq_mm.__all__)
    assert not both, f'`gplq_mm.X` must not be a function and a folder: {both}'


def test_every_room_stands_in_the_drawing() -> None:
    drawing = section('Layout').split('```')[1]
    folders = {path.name for path in PACKAGE.iterdir() if (path / '__init__.py').exists()}
    missing = {name for name in folders if not re.search(rf'^ *(\S+, )*{name}/', drawing, re.M)}
    assert not missing, f'docs/design.md, drawing of the layout: {missing} is missing'


def test_the_path_of_an_image_names_files_that_are_there() -> None:
    steps = re.findall(r'^\d+\. (.*(?:\n {3}.*)*)', section('The path of one image'), re.M)
    assert 0 < len(steps) <= MOST_STEPS
    for step in steps:
        names = re.findall(r'`([\w/]+\.py)`', step)
        assert len(names) == 1, f'one file per step: {step}'
        assert (PACKAGE / names[0]).is_file(), f'{names[0]} is not there: {step}'


@pytest.mark.parametrize('document', ['design.md', '../CONTRIBUTING.md'])
def test_documents_name_files_that_are_there(document: str) -> None:
    text = (ROOT / 'docs' / document).read_text(encoding='utf-8')
    named = re.findall(r'`((?:gplq_mm|tests)/[\w/]+(?:\.\w+)?)`', text)
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing, f'{document} names what is not there: {missing}'


def section(title: str) -> str:
    """Text of one section of docs/design.md."""
    text = DESIGN.read_text(encoding='utf-8')
    return text.split(f'\n## {title}\n')[1].split('\n## ')[0]
