# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Read an HTML page as a test sees it: is it whole, what does it load, what does it show."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {'meta', 'br', 'img', 'wbr', 'input', 'link'}
LOADING = ('src', 'srcset', 'href', 'action', 'poster', 'data')


class Page(HTMLParser):
    """Content of a page.

    Attributes:
        open: Elements that are not closed.
        loads: What it would load or lead to outside itself.
        specs: Charts in order, as Vega-Lite specifications.
        values: Numbers of the tables' cells by quantity and stage.
        text: Visible text.
    """

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.specs: list[dict[str, Any]] = []
        self.values: dict[tuple[str, str], float] = {}
        self.text = ''

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or '' for key, value in attrs}
        self.loads += [given[key] for key in LOADING if not given.get(key, '#').startswith('#')]
        if 'data-spec' in given:
            self.specs.append(json.loads(given['data-spec']))
        if 'data-value' in given:
            key = given['data-figure'], given.get('data-stage') or given.get('data-run', '')
            self.values[key] = float(given['data-value'])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f'</{tag}>'

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ['style']:
            urls = re.findall(r'url\(([^)]{0,40})|@import', data)
            self.loads += [url for url in urls if not url.startswith('data:')]
        elif self.open[-1:] != ['script']:
            self.text += data


def read_page(path: Path) -> Page:
    """Parse a page."""
    page = Page()
    page.feed(path.read_text(encoding='utf-8'))
    page.close()
    return page
