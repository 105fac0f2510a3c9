# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Floor 4: handlers of other libraries' classes, one adapter a library."""

from importlib import import_module
from importlib.util import find_spec

ADAPTERS = {
    'mmcv': 'mmcv',
    'mmpretrain': 'mmpretrain',
    'mmdet': 'mmdet',
    'mmdet_vitdet': 'projects.ViTDet.vitdet.vit',
}
"""Adapter -> module that must be importable for it."""


def load_adapters() -> list[str]:
    """Register the handlers of every library that is installed.

    Returns:
        Names of the adapters that were loaded; calling it again changes nothing.
    """
    loaded = [name for name, needed in ADAPTERS.items() if _is_importable(needed)]
    for name in loaded:
        import_module(f'{__name__}.{name}')
    return loaded


def _is_importable(name: str) -> bool:
    """Whether a module is found; its parent packages are imported, itself it is not."""
    try:
        return find_spec(name) is not None
    except ImportError:
        return False
