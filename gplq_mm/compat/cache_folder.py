# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Folder for files that are made once per user and machine, such as compiled kernels."""

import os
import stat
from pathlib import Path


def cache_folder() -> Path:
    """The user's folder for this package, created if it is missing, closed to other users.

    Raises:
        OSError: If it belongs to another user, who could put any code into it.
    """
    base = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    folder = Path(base) / 'gplq_mm'
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, 'getuid'):
        for found in (folder.lstat(), folder.stat()):  # a link, and the folder behind it
            if found.st_uid != os.getuid():
                raise OSError(
                    f'{folder} belongs to user {found.st_uid}, not to you ({os.getuid()}): remove '
                    'it, or set XDG_CACHE_HOME to a folder of yours'
                )
        if stat.S_IMODE(folder.stat().st_mode) & 0o077:
            folder.chmod(0o700)
    return folder
