# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""GPLQ for the OpenMMLab 2.0 libraries.

Importing this package needs neither mmdet nor mmpretrain nor mmcv: whatever knows one of them
is imported by the registries when a config names it.
"""

from gplq_mm.compat import is_installed
from gplq_mm.version import __version__

__all__ = ['__version__', 'is_installed']
