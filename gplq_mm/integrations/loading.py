# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Handlers of other libraries' classes, one adapter per library."""

from importlib import import_module
from importlib.util import find_spec

from torch import nn

from .mm import model_structure  # noqa: F401  registers facts about models, with torch alone

ADAPTERS = {
    'mmcv': ('mmcv',),
    'mmpretrain': ('mmpretrain',),
    'mmdet': ('mmdet',),
    'mmdet_vitdet': ('projects.ViTDet.vitdet.vit',),
    'mmseg': ('mmseg', 'ftfy', 'regex'),
}
"""Adapter -> modules that must be importable for it; mmseg 1.2 imports ftfy and regex without
requiring them."""
MM_LIBRARIES = ('mmengine', 'mmcv', 'mmpretrain', 'mmdet', 'mmseg', 'projects')
PLAIN_ADAPTERS = ('timm', 'torchvision')
"""Adapters of libraries without MMEngine, by the library's name; loaded for their models."""
_FILES = {
    'mmcv': 'gplq_mm.integrations.mm.adapters.mmcv.layers',
    'mmpretrain': 'gplq_mm.integrations.mm.adapters.mmpretrain',
    'mmdet': 'gplq_mm.integrations.mm.adapters.mmdet.detectors',
    'mmdet_vitdet': 'gplq_mm.integrations.mm.adapters.mmdet.vitdet',
    'mmseg': 'gplq_mm.integrations.mm.adapters.mmseg',
    'timm': 'gplq_mm.integrations.timm',
    'torchvision': 'gplq_mm.integrations.torchvision.transformers',
}


def load_adapters() -> list[str]:
    """Register the handlers of every OpenMMLab library that is installed.

    Returns:
        Names of the adapters that were loaded; calling it again changes nothing.
    """
    loaded = [name for name, needed in ADAPTERS.items() if all(map(_is_importable, needed))]
    for name in loaded:
        import_module(_FILES[name])
    return loaded


def load_adapters_of(model: nn.Module) -> list[str]:
    """Register the handlers of the libraries whose classes (or subclasses) a model uses.

    Args:
        model: Any torch module; only libraries that it uses are imported.

    Returns:
        Names of the adapters that were loaded.
    """
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    used = {cls.__module__.partition('.')[0] for cls in classes}
    loaded = load_adapters() if used.intersection(MM_LIBRARIES) else []
    plain = [name for name in PLAIN_ADAPTERS if name in used]
    for name in plain:
        import_module(_FILES[name])
    return [*loaded, *plain]


def _is_importable(name: str) -> bool:
    """Whether a module can be found; its parent packages are imported, the module is not."""
    try:
        return find_spec(name) is not None
    except ImportError:
        return False
