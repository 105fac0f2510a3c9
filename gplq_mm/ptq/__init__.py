# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Stage 2: weight PTQ, one file per algorithm."""

from .algorithms import WEIGHT_PTQ, build_weight_ptq, register_weight_ptq
from .corrections.bias_correction import BiasCorrection
from .corrections.finetune import FineTuning
from .corrections.qwt_branch import QwTBranch
from .corrections.qwt_v2 import QwTv2
from .corrections.repq import RepQ
from .ranges.minmax import MinMaxPTQ
from .ranges.mse import MSEPTQ
from .ranges.percentile import PercentilePTQ
from .rounding.adaround import AdaRound
from .rounding.brecq import BRECQ
from .rounding.global_reconstruction import GlobalReconstruction
from .rounding.gptq import GPTQ
from .single_layer import SingleLayerGPTQ, layerwise_rounding
from .task import PTQTask, RangePTQ, WeightPTQ, write_codes, write_nearest

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
