# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Window attention: Swin, Swin V2."""

from timm.models import swin_transformer, swin_transformer_v2
from torch import Tensor

from ...convert import POSITION_MLP, register_attention
from ...ops import biased_qkv
from ...ops.attention.window import CosineWindowAttention, WindowAttention


class QuantWindowAttention(WindowAttention, swin_transformer.WindowAttention):
    """``WindowAttention`` of Swin with quantized matmuls."""


class QuantWindowAttentionV2(CosineWindowAttention, swin_transformer_v2.WindowAttention):
    """``WindowAttention`` of Swin V2 (cosine attention) with quantized matmuls."""

    def projected(self, x: Tensor) -> Tensor:
        """``(B, N, C)`` -> ``(B, N, 3 * C)``; the keys have no bias."""
        return biased_qkv(self, x)


register_attention({swin_transformer.WindowAttention: QuantWindowAttention})
register_attention({swin_transformer_v2.WindowAttention: QuantWindowAttentionV2}, POSITION_MLP)
