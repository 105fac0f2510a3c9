# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Runs a model over images unit by unit, with the activations of one unit at a time."""

from .calls import Call, CallStore, all_tensors
from .distributed import all_reduce_sum, broadcast_from_0
from .exact_sum import ExactSum
from .interception import Reached, intercepted
from .unit_stream import UnitStream
from .units import Unit, find_units

__all__ = [
    'Call',
    'CallStore',
    'ExactSum',
    'Reached',
    'Unit',
    'UnitStream',
    'all_reduce_sum',
    'all_tensors',
    'broadcast_from_0',
    'find_units',
    'intercepted',
]
