# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""GPLQ: quantization of vision transformers, with torch alone or inside the OpenMMLab libraries.

Importing the package needs no other library; its functions need torch (``docs/api.md``). Code that
needs another library is imported when a config or a model uses it.
"""

from typing import TYPE_CHECKING, Any

from gplq_mm.compat.installed import is_installed
from gplq_mm.version import __version__

if TYPE_CHECKING:
    from gplq_mm.api import (
        calibrate,
        deploy,
        distill,
        load,
        quantize,
        quantize_weights,
        save,
        stage1_optimizer,
        train_stage1,
    )

__all__ = [
    '__version__',
    'calibrate',
    'deploy',
    'distill',
    'is_installed',
    'load',
    'quantize',
    'quantize_weights',
    'save',
    'stage1_optimizer',
    'train_stage1',
]


def __getattr__(name: str) -> Any:
    """Functions of ``gplq_mm.api``, imported with torch at their first use."""
    if name in __all__:
        from gplq_mm import api

        return getattr(api, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
