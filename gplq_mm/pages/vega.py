# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Vega, the chart library that pages embed, as one script that needs no network."""

import hashlib
import importlib
from functools import cache
from importlib.metadata import version

from ..compat.cache_folder import cache_folder
from ..compat.installed import is_installed
from ..stream.stored_file import unfinished_file

PACKAGES = {'jinja2': 'Jinja2', 'vl_convert': 'vl-convert-python'}
"""Import name and distribution of what pages are made with."""
# `window.vegaEmbed` is all that the pages call.
_SNIPPET = 'window.vegaEmbed = vegaEmbed;'


class MissingPackagesError(ValueError):
    """Pages cannot be made here; the message says what to install."""


def require_packages() -> None:
    """Check that templates and charts can be made.

    Raises:
        MissingPackagesError: If a package is missing, with the command that installs it.
    """
    missing = [name for module, name in PACKAGES.items() if not is_installed(module)]
    if missing:
        raise MissingPackagesError(f'the HTML report needs: pip install {" ".join(missing)}')


@cache
def vega_script() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that defines ``vegaEmbed``.

    Bundling takes seconds, so the result is stored in the user's cache folder.
    """
    key = f'{version(PACKAGES["vl_convert"])} {_SNIPPET}'
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    path = cache_folder() / f'vega_{digest}.js'
    if not path.is_file():
        bundle: str = importlib.import_module('vl_convert').javascript_bundle(_SNIPPET)
        # the HTML parser ends a script at this text, wherever it stands
        with unfinished_file(path) as unfinished:  # several processes may do so at once
            script = f'(() => {{{bundle}}})();'.replace('</script', '<\\/script')
            unfinished.write_text(script, encoding='utf-8')
    return path.read_text(encoding='utf-8')
