# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Floor 5: what configs build. The GPLQ builder, mimicking, necks."""

from . import necks
from .gplq import GPLQState, build_gplq
from .mimic_settings import resolve_mimic
from .mimicking import Mimicking, make_mimicking

__all__ = ['GPLQState', 'Mimicking', 'build_gplq', 'make_mimicking', 'necks', 'resolve_mimic']
