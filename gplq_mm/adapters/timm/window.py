# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Window attention: Swin, Swin V2."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import swin_transformer, swin_transformer_v2
from torch import Tensor

from ...conversion import Context, attach_matmuls, child_name, register_attention, register_handler
from ...modules import QuantLinear, quantized_attention, swap_class
from ...modules.window_attention import WindowAttention, biased, gathered_bias

_MAX_LOG_SCALE = math.log(1.0 / 0.01)


class QuantWindowAttention(WindowAttention, swin_transformer.WindowAttention):
    """``WindowAttention`` of Swin with quantized matmuls."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(windows * B, N, C)`` -> same; ``mask`` is ``(windows, N, N)``."""
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, N, D)
        adjust, extras = self.adjustment(mask)
        x = quantized_attention(
            self.qk_matmul, self.pv_matmul, q * self.scale, k, v, adjust, extras, self.attn_drop
        )
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class QuantWindowAttentionV2(swin_transformer_v2.WindowAttention):
    """``WindowAttention`` of Swin V2 (cosine attention) with quantized matmuls."""

    qk_matmul: Any
    pv_matmul: Any

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(windows * B, N, C)`` -> same; ``mask`` is ``(windows, N, N)``."""
        B, N, C = x.shape
        qkv = self._qkv(x).reshape(B, N, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, heads, N, D)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        factor = torch.clamp(self.logit_scale, max=_MAX_LOG_SCALE).exp()
        extras = (factor, self._bias()) if mask is None else (factor, self._bias(), mask)
        x = quantized_attention(
            self.qk_matmul, self.pv_matmul, q, k, v, _scaled_and_biased, extras, self.attn_drop
        )
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, N, C)))

    def _qkv(self, x: Tensor) -> Tensor:
        """Projection whose bias has no part for the keys, ``(B, N, 3 * C)``."""
        if self.q_bias is None:
            return self.qkv(x)
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        if self.qkv_bias_separate:
            return self.qkv(x) + bias
        if isinstance(self.qkv, QuantLinear):
            return self.qkv.linear(x, bias)
        return F.linear(x, self.qkv.weight, bias)

    def _bias(self) -> Tensor:
        """Continuous position bias, ``(1, heads, N, N)``."""
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        return 16 * torch.sigmoid(gathered_bias(table, self.relative_position_index))


def _scaled_and_biased(logits: Tensor, factor: Tensor, *bias_and_mask: Tensor) -> Tensor:
    return biased(logits * factor, *bias_and_mask)


register_attention({swin_transformer.WindowAttention: QuantWindowAttention})


@register_handler(swin_transformer_v2.WindowAttention)
def convert_window_attention_v2(module: Any, name: str, context: Context) -> None:
    """Both matmuls; the position MLP stays float."""
    swap_class(module, QuantWindowAttentionV2)
    attach_matmuls(module, name, context, module.num_heads)
    context.skip(
        child_name(name, 'cpb_mlp'), 'acts on a constant table: a deployed model stores its output'
    )
