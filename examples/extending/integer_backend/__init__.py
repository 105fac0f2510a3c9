# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Inference in int64 on a CPU, and the integers of a model for another runtime."""

from gplq_mm.ops import register_backend

from .export import export
from .products import linear, matmul, refusal

__all__ = ['NAME', 'export', 'register']

NAME = 'int64'


def register() -> None:
    """Take part in the choice of a backend; ``gplq_mm.ops.unregister_backend`` undoes it."""
    register_backend(NAME, 'inference', ['linear'], refusal, linear)
    register_backend(NAME, 'inference', ['matmul'], refusal, matmul)


register()
