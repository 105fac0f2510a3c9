# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Templates, and HTML files that load nothing from anywhere."""

import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..stream.stored_file import unfinished_file
from .charts import CONFIG
from .vega import require_packages, vega_script

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

TEMPLATES = Path(__file__).parent / 'templates'
_SEPARATOR = re.compile(r'([/_.])(?=\w)')


def render(template: str, **content: Any) -> str:
    """A page as text.

    Args:
        template: File of the templates' folder.
        **content: What the template shows.

    Raises:
        MissingPackagesError: If a package is missing.
    """
    require_packages()
    page = _environment().get_template(template)
    return page.render(vega_script=vega_script(), chart_config=CONFIG, **content)


def write_page(path: Path, text: str) -> None:
    """Write a page to a temporary file and rename it: a browser never reads half of one."""
    with unfinished_file(path) as unfinished:
        unfinished.write_text(text, encoding='utf-8')


def breakable(name: str) -> 'Markup':
    """A dotted or slashed name that a narrow column may break after a separator."""
    from markupsafe import Markup, escape

    return Markup(_SEPARATOR.sub(r'\1<wbr>', str(escape(name))))


@cache
def _environment() -> 'Environment':
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters['breakable'] = breakable
    return environment
