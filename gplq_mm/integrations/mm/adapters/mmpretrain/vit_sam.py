# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""ViTSAM: attention with decomposed relative positions, the backbone of SAM and ViTDet."""

from typing import Any

from mmpretrain.models.backbones.vit_sam import Attention

from .....convert import Context, attach_rel_pos_matmuls, register_handler
from .....ops import swap_class
from .....ops.attention.relative_position import RelPosAttention


class QuantAttention(RelPosAttention, Attention):
    """``Attention`` with quantized matmuls."""


@register_handler(Attention)
def convert_attention(module: Any, name: str, context: Context) -> None:
    """Quantize both matmuls and both relative position products."""
    swap_class(module, QuantAttention)
    attach_rel_pos_matmuls(module, name, context)
