# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Hooks: they say when a step runs; its computation is elsewhere."""

from .gplq_hook import GPLQHook

__all__ = ['GPLQHook']
