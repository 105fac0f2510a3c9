# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The files of `examples/extending`, imported as a user's own."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gplq_mm.convert.handlers import HANDLERS
from gplq_mm.ops import dispatch, unregister_backend
from gplq_mm.ptq import WEIGHT_PTQ

EXAMPLES = Path(__file__).resolve().parents[2] / 'examples' / 'extending'


@contextmanager
def example(name: str) -> Iterator[Any]:
    """One of the examples, imported anew; what its import registers is removed at the end."""
    before = set(HANDLERS), set(WEIGHT_PTQ), _backends()
    sys.path.insert(0, str(EXAMPLES))
    try:
        module = importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))
    after = set(HANDLERS), set(WEIGHT_PTQ), _backends()
    handlers, algorithms, backends = (b - a for a, b in zip(before, after, strict=True))
    try:
        yield module
    finally:
        for imported in [m for m in sys.modules if m.partition('.')[0] == name]:
            del sys.modules[imported]
        for cls in handlers:
            del HANDLERS[cls]
        for algorithm in algorithms:
            del WEIGHT_PTQ[algorithm]
        for backend in backends:
            unregister_backend(backend)


def _backends() -> set[str]:
    return {i.backend for known in dispatch._IMPLEMENTATIONS.values() for i in known}
