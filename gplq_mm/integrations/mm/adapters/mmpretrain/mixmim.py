# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""MixMIM: window attention over the tokens of two mixed images."""

from collections.abc import Callable, Sequence

import torch
from mmpretrain.models.backbones.mixmim import MixMIMWindowAttention
from torch import Tensor

from .....convert import register_attention
from .....ops.attention.products import added
from .....ops.attention.window import WindowAttention, gathered_bias


class QuantMixMIMWindowAttention(WindowAttention, MixMIMWindowAttention):
    """``MixMIMWindowAttention`` with quantized matmuls."""

    def adjustment(self, mask: Tensor | None) -> tuple[Callable[..., Tensor], Sequence[Tensor]]:
        """``mask``, ``(windows * B, N, 1)``, is 1 for one image's tokens, else 0."""
        extras = [gathered_bias(self.relative_position_bias_table, self.relative_position_index)]
        if mask is not None:
            extras.append(_apart(mask.flatten(1)[:, None, None]))
        return added, extras


def _apart(mask: Tensor) -> Tensor:
    """``(B, 1, 1, N)`` -> ``(B, 1, N, N)``: very negative between tokens of different images."""
    together = mask * mask.mT + (1 - mask) * (1 - mask).mT
    return (65500 if mask.dtype == torch.float16 else 1e30) * (together - 1)


register_attention({MixMIMWindowAttention: QuantMixMIMWindowAttention})
