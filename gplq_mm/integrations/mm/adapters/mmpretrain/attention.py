# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Plain attention: ViT, DeiT, DINOv2, MAE (one class), BEiT, EVA-02."""

from typing import Any

import torch
from mmengine.model import Sequential
from mmpretrain.models.backbones.deit3 import DeiT3FFN
from mmpretrain.models.backbones.van import SpatialAttention
from mmpretrain.models.backbones.vit_eva02 import AttentionWithRoPE
from mmpretrain.models.utils import BEiTAttention, MultiheadAttention
from torch import Tensor

from .....convert import (
    Context,
    child_name,
    register_attention,
    register_handler,
    register_roles,
    set_ffn_roles,
)
from .....ops import quantized_attention, swap_class
from .....ops.attention.dot_product import DotProductAttention
from .....ops.attention.position_bias import PositionBiasAttention
from .....ops.attention.products import added
from .....ops.feed_forward import SequentialFeedForward


class QuantMultiheadAttention(DotProductAttention, MultiheadAttention):
    """``MultiheadAttention`` with explicit matmuls instead of fused attention."""

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, C)`` -> same."""
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dims)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D)
        x = self.attend(q, k, v).transpose(1, 2).reshape(B, N, self.embed_dims)
        x = self.out_drop(self.gamma1(self.proj_drop(self.proj(x))))
        return v.squeeze(1) + x if self.v_shortcut else x


class QuantBEiTAttention(PositionBiasAttention, BEiTAttention):
    """``BEiTAttention`` with quantized matmuls."""


class QuantAttentionWithRoPE(AttentionWithRoPE):
    """``AttentionWithRoPE`` with quantized matmuls; the rotated q and k are quantized."""

    qk_matmul: Any
    pv_matmul: Any

    def forward(self, x: Tensor, patch_resolution: tuple[int, int]) -> Tensor:
        """``(B, N, C)`` -> same."""
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(dim=0)  # each (B, heads, N, D)
        if self.rope:
            q = self._rotated(q, patch_resolution).type_as(v)
            k = self._rotated(k, patch_resolution).type_as(v)
        x = quantized_attention(
            self.qk_matmul, self.pv_matmul, q, k, v, added, (), self.attn_drop, self.scale
        )
        x = x.transpose(1, 2).reshape(B, N, -1)
        return self.proj_drop(self.proj(x))

    def _rotated(self, x: Tensor, patch_resolution: tuple[int, int]) -> Tensor:
        """Apply rotary position embedding to all but the class token, ``(B, heads, N, D)``."""
        if not self.with_cls_token:
            return self.rope(x, patch_resolution)
        rotated = self.rope(x[:, :, 1:, :], patch_resolution)
        return torch.cat((x[:, :, :1, :], rotated), -2)


register_attention(
    {
        MultiheadAttention: QuantMultiheadAttention,
        BEiTAttention: QuantBEiTAttention,
        AttentionWithRoPE: QuantAttentionWithRoPE,
    }
)


@register_handler(SpatialAttention)
def convert_spatial_attention(module: Any, name: str, context: Context) -> None:
    """VAN's attention: convolutions, which are children, and a gate; no matmul to quantize."""


class QuantFFNLayers(SequentialFeedForward, Sequential):
    """``DeiT3FFN.layers`` as one operator, if the engine fuses it."""


@register_handler(DeiT3FFN)
def convert_ffn(module: Any, name: str, context: Context) -> None:
    """The layers are children; their container may run them as one operator."""
    swap_class(module.layers, QuantFFNLayers)


@register_roles(DeiT3FFN)
def give_ffn_roles(module: Any, name: str, context: Context) -> None:
    """Set ``post_gelu`` or ``post_relu`` after the FFN's activation function."""
    set_ffn_roles(module.layers, child_name(name, 'layers'), context)
