# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Where files are kept that take long to make: compiled C, bundled scripts."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """The user's cache folder for this package; it may not exist yet."""
    base = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(base) / 'gplq_mm'
