# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Weight PTQ of stage 2: one file an algorithm."""

from .adaround import AdaRound
from .base import PTQTask, RangePTQ, WeightPTQ, write_codes, write_nearest
from .bias_correction import BiasCorrection
from .brecq import BRECQ
from .finetune import FineTuning
from .global_reconstruction import GlobalReconstruction
from .gptq import GPTQ
from .minmax import MinMaxPTQ
from .mse import MSEPTQ
from .percentile import PercentilePTQ
from .qwt_branch import QwTBranch
from .qwt_v2 import QwTv2
from .registry import WEIGHT_PTQ, build_weight_ptq, register_weight_ptq
from .repq import RepQ
from .single_layer import SingleLayerGPTQ, layerwise_rounding

__all__ = [
    'BRECQ',
    'GPTQ',
    'MSEPTQ',
    'WEIGHT_PTQ',
    'AdaRound',
    'BiasCorrection',
    'FineTuning',
    'GlobalReconstruction',
    'MinMaxPTQ',
    'PTQTask',
    'PercentilePTQ',
    'QwTBranch',
    'QwTv2',
    'RangePTQ',
    'RepQ',
    'SingleLayerGPTQ',
    'WeightPTQ',
    'build_weight_ptq',
    'layerwise_rounding',
    'register_weight_ptq',
    'write_codes',
    'write_nearest',
]
