# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Files beside the code that hosting sites read: citation, issue forms, release workflow."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import gplq_mm

ROOT = Path(__file__).resolve().parents[1]
FORMS = sorted((ROOT / '.github' / 'ISSUE_TEMPLATE').glob('*.yml'))


def read(path: Path) -> dict:
    """A YAML file; `on` is a word of YAML 1.1 for true, and stays one."""
    return yaml.safe_load(path.read_text(encoding='utf-8'))


def test_citation_has_the_version_and_the_paper() -> None:
    citation = read(ROOT / 'CITATION.cff')
    assert citation['version'] == gplq_mm.__version__
    assert citation['cff-version'] == '1.2.0'
    assert '2506.11784' in citation['preferred-citation']['journal']


@pytest.mark.parametrize('path', [f for f in FORMS if f.stem != 'config'], ids=lambda f: f.stem)
def test_issue_form_is_complete(path: Path) -> None:
    form = read(path)
    assert form['name'] and form['description']
    fields = [item for item in form['body'] if item['type'] != 'markdown']
    assert len({item['id'] for item in fields}) == len(fields)
    assert all(item['attributes']['label'] for item in fields)
    assert any(item.get('validations', {}).get('required') for item in fields)


@pytest.mark.parametrize('name', ['bug_report', 'accuracy'])
def test_form_requires_the_doctors_output(name: str) -> None:
    form = read(ROOT / '.github' / 'ISSUE_TEMPLATE' / f'{name}.yml')
    (field,) = (item for item in form['body'] if item.get('id') == 'doctor')
    assert 'python -m gplq_mm doctor' in field['attributes']['label']
    assert field['validations']['required'] is True


def test_pages_that_the_forms_and_policies_name_exist() -> None:
    texts = [path.read_text(encoding='utf-8') for path in (*FORMS, ROOT / 'SECURITY.md')]
    pages = {page for text in texts for page in re.findall(r'docs/[\w/]+\.md', text)}
    assert pages
    assert all((ROOT / page).is_file() for page in pages)


def test_release_runs_all_checks_before_it_publishes() -> None:
    jobs = read(ROOT / '.github' / 'workflows' / 'release.yml')['jobs']
    steps = [step.get('run', '') for step in jobs['build']['steps']]
    assert 'make test' in steps
    assert steps.index('make test') < steps.index('.venv/bin/python -m build')
    assert jobs['publish']['needs'] == 'build'
