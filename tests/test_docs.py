# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The documents name what exists: terms of the glossary, files of the index, links."""

import ast
import importlib
import re
import typing
from pathlib import Path
from typing import Any

import pytest

from gplq_mm.ptq import build_weight_ptq
from gplq_mm.recipe import Recipe, as_recipe, ptq_of
from gplq_mm.recipe.sections.section import Section

ROOT = Path(__file__).resolve().parents[1]
GLOSSARY = ROOT / 'docs' / 'glossary.md'
MOST_SENTENCES = 3


def entries() -> dict[str, list[str]]:
    """Meaning, source and location of each term."""
    rows = [line.strip('| \n').split('|') for line in GLOSSARY.read_text().splitlines()]
    cells = [[cell.strip() for cell in row] for row in rows if len(row) == 4]
    return {term: rest for term, *rest in cells[2:]}


def sections(hint: Any) -> list[type[Section]]:
    """Sections that a key's type allows."""
    if isinstance(hint, type) and issubclass(hint, Section):
        return [hint]
    return [found for part in typing.get_args(hint) for found in sections(part)]


def require_key(path: str) -> None:
    """Fail unless the recipe has a dotted key."""
    owners: list[type[Section]] = [Recipe]
    for key in path.split('.'):
        known = [owner.keys() for owner in owners]
        hints = [keys[key][0] for keys in known if key in keys]
        assert hints, f'no key {key!r} in {path!r}'
        owners = [section for hint in hints for section in sections(hint)]


def require_recipe_entry(text: str) -> None:
    """Fail unless ``a.b`` is a key of the recipe and takes the value after ``=``, if any."""
    path, _, value = text.partition('=')
    require_key(path)
    if value:
        section, key = path.split('.')
        given: Any = {key: ast.literal_eval(value)}
        changed = as_recipe({section: [{**given, 'num_bits': 8}] if section == 'rules' else given})
        stored = changed.as_dict()[section]
        assert (stored[-1] if section == 'rules' else stored)[key] == given[key]
        build_weight_ptq(ptq_of(changed))


def require_name(path: str) -> None:
    """Fail unless a dotted name is a module of the package, or an attribute of one."""
    try:
        importlib.import_module(path)
    except ModuleNotFoundError:
        owner, name = path.rsplit('.', 1)
        assert hasattr(importlib.import_module(owner), name), path


@pytest.mark.parametrize('term', entries())
def test_a_term_is_short_and_names_what_exists(term: str) -> None:
    meaning, source, where = entries()[term]
    assert 1 <= len(re.findall(r'[.)](?=\s|$)', meaning)) <= MOST_SENTENCES, meaning
    assert re.fullmatch(r'(\d{4}\.\d{5}(, \d{4}\.\d{5})*)?', source), source
    names = re.findall('`([^`]+)`', where)
    assert names, f'{term}: say where it is'
    for name in names:
        if name.startswith('recipe.'):
            require_recipe_entry(name.removeprefix('recipe.'))
        else:
            assert name.startswith('gplq_mm.'), name
            require_name(name)


def test_the_terms_are_in_order() -> None:
    terms = list(entries())
    assert len(terms) >= 30
    assert terms == sorted(terms, key=str.lower)


@pytest.mark.parametrize('wrong', ['recipe.optim.lrs', "recipe.weight.ptq='nonsense'"])
def test_a_wrong_key_or_value_fails(wrong: str) -> None:
    with pytest.raises((AssertionError, ValueError), match='lrs|nonsense'):
        require_recipe_entry(wrong.removeprefix('recipe.'))


def test_a_wrong_name_fails() -> None:
    with pytest.raises(AssertionError, match=r'gplq_mm\.ops\.Nothing'):
        require_name('gplq_mm.ops.Nothing')


def test_the_index_names_every_document() -> None:
    linked = re.findall(r'\]\((\w+\.md)\)', (ROOT / 'docs' / 'README.md').read_text())
    files = {path.name for path in (ROOT / 'docs').glob('*.md')} - {'README.md'}
    assert sorted(linked) == sorted(files)


@pytest.mark.parametrize('file', ['README.md', 'CONTRIBUTING.md', *sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / 'docs').glob('*.md')
)])  # fmt: skip
def test_links_lead_to_files(file: str) -> None:
    links = re.findall(r'\]\(([^)#:]+)\)', (ROOT / file).read_text())
    missing = [link for link in links if not ((ROOT / file).parent / link).exists()]
    assert not missing
