# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""mmdet's ``projects/ViTDet``, importable if its repository is the working directory."""

from typing import Any

from projects.ViTDet.vitdet.vit import Attention, Mlp

from .....convert import Context, attach_rel_pos_matmuls, register_ffn, register_handler
from .....ops import swap_class
from .....ops.attention.relative_position import RelPosAttention
from .....ops.feed_forward import MlpFeedForward


class QuantAttention(RelPosAttention, Attention):
    """``Attention`` with quantized matmuls."""


@register_handler(Attention)
def convert_attention(module: Any, name: str, context: Context) -> None:
    """Quantize both matmuls and both relative position products."""
    swap_class(module, QuantAttention)
    attach_rel_pos_matmuls(module, name, context)


class QuantMlp(MlpFeedForward, Mlp):
    """``Mlp`` as one operator, if the engine fuses it."""


register_ffn(Mlp, QuantMlp)
