# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""docs/api.md is what the docstrings say."""

import importlib.util
import re
from pathlib import Path

import gplq_mm

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location(
    'write_api_docs', ROOT / 'tools/dev/write_api_docs.py'
)
write_api_docs = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(write_api_docs)


def test_the_document_is_up_to_date() -> None:
    stored = write_api_docs.TARGET.read_text(encoding='utf-8')
    assert stored == write_api_docs.render(), 'run: python tools/dev/write_api_docs.py'


def test_every_function_is_in_it() -> None:
    assert set(write_api_docs.ORDER) == set(gplq_mm.__all__) - {'__version__', 'is_installed'}
    stored = write_api_docs.TARGET.read_text(encoding='utf-8')
    assert re.findall('^## (.*)$', stored, re.MULTILINE) == list(write_api_docs.ORDER)
