# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Hooks: each says when, none computes."""

from .gplq_hook import GPLQHook

__all__ = ['GPLQHook']
