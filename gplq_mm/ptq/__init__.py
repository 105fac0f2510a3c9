# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Stage 2: weight PTQ, one file per algorithm."""

from .algorithms import WEIGHT_PTQ, build_weight_ptq, register_weight_ptq
from .corrections.bias_correction import BiasCorrection
from .corrections.finetune import FineTuning
from .corrections.qwt_branch import QwTBranch
from .corrections.qwt_v2 import QwTv2
from .corrections.repq import RepQ
from .layer_matrix import CodeProducts
from .ranges.minmax import MinMaxPTQ
from .ranges.mse import MSEPTQ
from .ranges.percentile import PercentilePTQ
from .rounding.adaround import AdaRound
from .rounding.brecq import BRECQ
from .rounding.global_reconstruction import GlobalReconstruction
from .rounding.gptq import GPTQ, layer_codes
from .single_layer import SingleLayerGPTQ, layerwise_rounding
from .task import PTQTask, RangePTQ, WeightPTQ, folded, write_codes, write_nearest
from .unit_ptq import UnitPTQ, round_to_nearest

__all__ = [
    'BRECQ',
    'GPTQ',
    'MSEPTQ',
    'WEIGHT_PTQ',
    'AdaRound',
    'BiasCorrection',
    'CodeProducts',
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
    'UnitPTQ',
    'WeightPTQ',
    'build_weight_ptq',
    'folded',
    'layer_codes',
    'layerwise_rounding',
    'register_weight_ptq',
    'round_to_nearest',
    'write_codes',
    'write_nearest',
]
