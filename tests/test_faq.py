# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""`docs/faq.md` quotes messages that the code raises."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FAQ = ROOT / 'docs' / 'faq.md'
GAP = '\0'
"""Stands for a value in a message."""


def quoted() -> list[str]:
    """Messages in the headings of the page, `...` for a value."""
    headings = re.findall(r'^### (.*)$', FAQ.read_text(encoding='utf-8'), re.M)
    return [message for heading in headings for message in re.findall('`([^`]+)`', heading)]


def texts() -> Iterator[str]:
    """Strings of the package and the tools, values left out."""
    for folder in ('gplq_mm', 'tools'):
        for path in (ROOT / folder).rglob('*.py'):
            if '.mim' not in path.parts:
                tree = ast.parse(path.read_text(encoding='utf-8'))
                yield from (text_of(node) for node in ast.walk(tree))


def text_of(node: ast.AST) -> str:
    """Text of a string or f-string; empty for another node."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ''
    if isinstance(node, ast.JoinedStr):
        return ''.join(text_of(part) or GAP for part in node.values)
    return ''


@pytest.fixture(scope='module')
def messages() -> str:
    return '\n'.join(text for text in texts() if text)


@pytest.mark.parametrize('message', quoted())
def test_a_quoted_message_is_raised(message: str, messages: str) -> None:
    pattern = f'[^\n]*{GAP}[^\n]*'.join(map(re.escape, message.split('...')))
    assert re.search(pattern, messages), f'no message of the code has {message!r}'


def test_a_message_that_nobody_raises_is_found(messages: str) -> None:
    assert not re.search('the moon is not calibrated', messages)


def test_the_page_has_the_messages_of_all_parts() -> None:
    assert len(quoted()) >= 35
    assert len(FAQ.read_text(encoding='utf-8').splitlines()) <= 200
