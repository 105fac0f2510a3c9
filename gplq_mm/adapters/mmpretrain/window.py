# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Window attention: Swin, Swin V2."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from mmpretrain.models.utils import ShiftWindowMSA, WindowMSA, WindowMSAV2
from torch import Tensor

from ...conversion import Context, attach_matmuls, child_name, register_attention, register_handler
from ...modules import QuantLinear, quantized_attention, swap_class
from ...modules.window_attention import WindowAttention, biased, gathered_bias

_MAX_LOG_SCALE = math.log(1.0 / 0.01)


class QuantWindowMSA(WindowAttention, WindowMSA):
    """``WindowMSA`` with quantized matmuls."""


class QuantWindowMSAV2(WindowMSAV2):
    """``WindowMSAV2`` (cosine attention) with quantized matmuls."""

    qk_matmul: Any
    pv_matmul: Any

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(windows * B, N, C)`` -> same; ``mask`` is ``(windows, N, N)``."""
        B, N, C = x.shape
        qkv = self._qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        factor = torch.clamp(self.logit_scale, max=_MAX_LOG_SCALE).exp()
        extras = (factor, self._bias()) if mask is None else (factor, self._bias(), mask)
        x = quantized_attention(
            self.qk_matmul, self.pv_matmul, q, k, v, _scaled_and_biased, extras, self.attn_drop
        )
        x = x.transpose(1, 2).reshape(B, N, C)
        return self.proj_drop(self.proj(x))

    def _qkv(self, x: Tensor) -> Tensor:
        bias = None
        if self.q_bias is not None:
            bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        if isinstance(self.qkv, QuantLinear):
            return self.qkv.linear(x, bias)
        return F.linear(x, self.qkv.weight, bias)

    def _bias(self) -> Tensor:
        """Continuous position bias, ``(1, heads, N, N)``."""
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        return 16 * torch.sigmoid(gathered_bias(table, self.relative_position_index))


def _scaled_and_biased(logits: Tensor, factor: Tensor, *bias_and_mask: Tensor) -> Tensor:
    return biased(logits * factor, *bias_and_mask)


register_attention({WindowMSA: QuantWindowMSA})


@register_handler(WindowMSAV2)
def convert_window_msa_v2(module: Any, name: str, context: Context) -> None:
    """Both matmuls; the position MLP stays float."""
    swap_class(module, QuantWindowMSAV2)
    attach_matmuls(module, name, context, module.num_heads)
    context.skip(
        child_name(name, 'cpb_mlp'), 'acts on a constant table: a deployed model stores its output'
    )


@register_handler(ShiftWindowMSA)
def pass_through(module: Any, name: str, context: Context) -> None:
    """It only shifts and partitions: its child ``w_msa`` is the attention."""
