# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Backbones of mmseg: Swin, BEiT, MAE, MiT (SegFormer), Twins; its ViT uses mmcv's attention."""

from typing import Any

from mmseg.models.backbones.beit import BEiTAttention
from mmseg.models.backbones.bisenetv1 import AttentionRefinementModule
from mmseg.models.backbones.mae import MAEAttention
from mmseg.models.backbones.mit import EfficientMultiheadAttention, MixFFN
from mmseg.models.backbones.mscan import MSCAAttention, MSCASpatialAttention
from mmseg.models.backbones.swin import ShiftWindowMSA, WindowMSA
from mmseg.models.backbones.twins import GlobalSubsampledAttention, LocallyGroupedSelfAttention

from .....convert import (
    Context,
    child_name,
    register_attention,
    register_handler,
    register_roles,
    set_ffn_roles,
)
from .....ops.attention.grouped import GroupedAttention
from .....ops.attention.position_bias import PositionBiasAttention
from .....ops.attention.window import WindowAttention


class QuantWindowMSA(WindowAttention, WindowMSA):
    """``WindowMSA`` with quantized matmuls."""


class QuantBEiTAttention(PositionBiasAttention, BEiTAttention):
    """``BEiTAttention`` with quantized matmuls."""


class QuantMAEAttention(PositionBiasAttention, MAEAttention):
    """``MAEAttention`` with quantized matmuls."""


class QuantLocallyGroupedSelfAttention(GroupedAttention, LocallyGroupedSelfAttention):
    """``LocallyGroupedSelfAttention`` with quantized matmuls."""


register_attention(
    {
        WindowMSA: QuantWindowMSA,
        BEiTAttention: QuantBEiTAttention,
        MAEAttention: QuantMAEAttention,
        LocallyGroupedSelfAttention: QuantLocallyGroupedSelfAttention,
    }
)


@register_handler(
    ShiftWindowMSA,
    EfficientMultiheadAttention,
    GlobalSubsampledAttention,
    AttentionRefinementModule,
    MSCAAttention,
    MSCASpatialAttention,
)
def pass_through(module: Any, name: str, context: Context) -> None:
    """No own matmul: children have handlers (``w_msa``, torch's ``attn``, convolutions)."""


@register_roles(MixFFN)
def give_ffn_roles(module: Any, name: str, context: Context) -> None:
    """Set ``post_gelu`` for the convolution after the activation function."""
    set_ffn_roles(module.layers, child_name(name, 'layers'), context)
