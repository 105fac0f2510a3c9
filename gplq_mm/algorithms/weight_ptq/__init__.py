# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Weight PTQ of stage 2: one file an algorithm."""

from .base import PTQTask, RangePTQ, WeightPTQ, write_codes, write_nearest
from .gptq import GPTQ
from .minmax import MinMaxPTQ
from .mse import MSEPTQ
from .percentile import PercentilePTQ
from .registry import WEIGHT_PTQ, build_weight_ptq, register_weight_ptq

__all__ = [
    'GPTQ',
    'MSEPTQ',
    'WEIGHT_PTQ',
    'MinMaxPTQ',
    'PTQTask',
    'PercentilePTQ',
    'RangePTQ',
    'WeightPTQ',
    'build_weight_ptq',
    'register_weight_ptq',
    'write_codes',
    'write_nearest',
]
