# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Window attention: Swin, Swin V2."""

from typing import Any

import torch
from mmpretrain.models.utils import ShiftWindowMSA, WindowMSA, WindowMSAV2
from torch import Tensor

from .....convert import POSITION_MLP, Context, register_attention, register_handler
from .....ops import linear_with_bias
from .....ops.attention.window import CosineWindowAttention, WindowAttention


class QuantWindowMSA(WindowAttention, WindowMSA):
    """``WindowMSA`` with quantized matmuls."""


class QuantWindowMSAV2(CosineWindowAttention, WindowMSAV2):
    """``WindowMSAV2`` (cosine attention) with quantized matmuls."""

    qkv: Any
    q_bias: Any
    v_bias: Any

    def projected(self, x: Tensor) -> Tensor:
        """``(B, N, C)`` -> ``(B, N, 3 * C)``; the keys have no bias."""
        bias = None
        if self.q_bias is not None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        return linear_with_bias(self.qkv, x, bias)


register_attention({WindowMSA: QuantWindowMSA})
register_attention({WindowMSAV2: QuantWindowMSAV2}, POSITION_MLP)


@register_handler(ShiftWindowMSA)
def pass_through(module: Any, name: str, context: Context) -> None:
    """The module only shifts and partitions: its child ``w_msa`` is the attention."""
