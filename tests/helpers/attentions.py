# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Attention classes of mmpretrain, each alone: how to make it, its input, its other arguments."""

import torch
from mmpretrain.models.backbones import (
    davit,
    efficientformer,
    hivit,
    levit,
    mixmim,
    mvit,
    twins,
    vit_sam,
    xcit,
)
from mmpretrain.models.backbones.vit_eva02 import AttentionWithRoPE
from mmpretrain.models.utils import (
    BEiTAttention,
    ChannelMultiheadAttention,
    LeAttention,
    MultiheadAttention,
    RotaryEmbeddingFast,
    ShiftWindowMSA,
    WindowMSA,
    WindowMSAV2,
)
from torch import nn

TOKENS = (2, 9, 16)
MASK = torch.where(torch.rand(2, 9, 9, generator=torch.Generator().manual_seed(0)) > 0.5, 0, -100)
SHIFT = dict(shift_size=1, pad_small_map=True)
REL_POS = dict(rel_pos_spatial=True, input_size=(4, 4))


def _rope() -> nn.Module:
    return RotaryEmbeddingFast(embed_dims=8, patch_resolution=(3, 3))


ATTENTIONS = {
    'mha': (lambda: MultiheadAttention(16, 2, attn_drop=0.2, proj_drop=0.2), TOKENS, ()),
    'mha_no_bias': (lambda: MultiheadAttention(16, 4, qkv_bias=False), TOKENS, ()),
    'mha_qk_scale': (lambda: MultiheadAttention(16, 2, qk_scale=0.3), TOKENS, ()),
    'mha_shortcut': (
        lambda: MultiheadAttention(16, 1, input_dims=12, v_shortcut=True),
        (2, 9, 12),
        (),
    ),
    'mha_layer_scale': (
        lambda: MultiheadAttention(16, 2, layer_scale_init_value=0.1),
        TOKENS,
        (),
    ),
    'window': (lambda: WindowMSA(16, (3, 3), 2, attn_drop=0.2), (4, 9, 16), ()),
    'window_mask': (lambda: WindowMSA(16, (3, 3), 2, qk_scale=0.3), (4, 9, 16), (MASK,)),
    'window_v2': (lambda: WindowMSAV2(16, (3, 3), 2, attn_drop=0.2), (4, 9, 16), ()),
    'window_v2_mask': (lambda: WindowMSAV2(16, (3, 3), 2, qkv_bias=False), (4, 9, 16), (MASK,)),
    'shift': (lambda: ShiftWindowMSA(16, 2, 3, **SHIFT), (2, 20, 16), ((4, 5),)),
    'shift_v2': (
        lambda: ShiftWindowMSA(16, 2, 3, window_msa=WindowMSAV2, **SHIFT),
        (2, 20, 16),
        ((4, 5),),
    ),
    'beit': (lambda: BEiTAttention(16, 2, (2, 4), True, attn_drop_rate=0.2), TOKENS, ()),
    'beit_bias': (lambda: BEiTAttention(16, 2, None, False, bias=True), TOKENS, ()),
    'beit_shared': (
        lambda: BEiTAttention(16, 2, None, False),
        TOKENS,
        (torch.linspace(-1, 1, 162).view(2, 9, 9),),
    ),
    'rope': (lambda: AttentionWithRoPE(16, 2, rope=_rope()), (2, 10, 16), ((3, 3),)),
    'rope_no_cls': (
        lambda: AttentionWithRoPE(16, 2, rope=_rope(), with_cls_token=False, attn_drop=0.2),
        TOKENS,
        ((3, 3),),
    ),
    'sam': (lambda: vit_sam.Attention(16, 2), (2, 3, 4, 16), ()),
    'sam_rel_pos': (
        lambda: vit_sam.Attention(16, 2, use_rel_pos=True, input_size=(3, 4)),
        (2, 3, 4, 16),
        (),
    ),
    'sam_resized': (
        lambda: vit_sam.Attention(16, 2, use_rel_pos=True, input_size=(5, 5)),
        (2, 3, 4, 16),
        (),
    ),
    'le': (lambda: LeAttention(16, 8, 2, 2, resolution=(3, 3)), TOKENS, ()),
    'levit': (lambda: levit.Attention(16, 8, 2, 2, resolution=3), TOKENS, ()),
    'levit_subsample': (
        lambda: levit.AttentionSubsample(16, 24, 8, 2, 2, resolution=3),
        TOKENS,
        (),
    ),
    'efficientformer': (
        lambda: efficientformer.AttentionWithBias(16, 2, 8, 2, resolution=3),
        TOKENS,
        (),
    ),
    'hivit': (lambda: hivit.Attention(3, 16, 2), TOKENS, (True,)),
    'hivit_mask': (
        lambda: hivit.Attention(3, 16, 2, rpe=False),
        TOKENS,
        (None, torch.tensor([[1] * 9, [1] * 5 + [0] * 4])),
    ),
    'subsampled': (
        lambda: twins.GlobalSubsampledAttention(16, 2, sr_ratio=2, attn_drop=0.2),
        (2, 24, 16),
        ((4, 6),),
    ),
    'subsampled_1': (
        lambda: twins.GlobalSubsampledAttention(16, 2, qk_scale=0.3, qkv_bias=False),
        (2, 6, 16),
        ((2, 3),),
    ),
    'grouped': (
        lambda: twins.LocallyGroupedSelfAttention(16, 2, attn_drop_rate=0.2, window_size=3),
        (2, 20, 16),
        ((4, 5),),
    ),
    'grouped_whole': (
        lambda: twins.LocallyGroupedSelfAttention(16, 2, True, 0.3, window_size=2),
        (2, 24, 16),
        ((4, 6),),
    ),
    'grouped_right': (
        lambda: twins.LocallyGroupedSelfAttention(16, 2, window_size=2),
        (2, 20, 16),
        ((4, 5),),
    ),
    'davit_window': (lambda: davit.DaViTWindowMSA(16, (3, 3), 2, attn_drop=0.2), TOKENS, ()),
    'davit_window_mask': (lambda: davit.DaViTWindowMSA(16, (3, 3), 2), (4, 9, 16), (MASK,)),
    'davit_channel': (lambda: davit.ChannelAttention(16, 2), TOKENS, ()),
    'mixmim': (lambda: mixmim.MixMIMWindowAttention(16, (3, 3), 2), (4, 9, 16), ()),
    'mixmim_mask': (
        lambda: mixmim.MixMIMWindowAttention(16, (3, 3), 2, attn_drop_rate=0.2),
        (4, 9, 16),
        ((torch.arange(36).view(4, 9, 1) % 5 < 2).float(),),
    ),
    'xca': (lambda: xcit.XCA(16, 2, attn_drop=0.2, proj_drop=0.2), TOKENS, ()),
    'xca_bias': (lambda: xcit.XCA(16, 4, qkv_bias=True), TOKENS, ()),
    'class_token': (lambda: xcit.ClassAttntion(16, 2, attn_drop=0.2), TOKENS, ()),
    'channel': (lambda: ChannelMultiheadAttention(16, 2, proj_drop=0.2), TOKENS, ()),
    'channel_fixed': (
        lambda: ChannelMultiheadAttention(16, 2, qkv_bias=True, qk_scale_type='fixed'),
        TOKENS,
        (),
    ),
    'channel_shortcut': (
        lambda: ChannelMultiheadAttention(16, 1, input_dims=12, v_shortcut=True),
        (2, 9, 12),
        (),
    ),
    'mvit': (
        lambda: mvit.MultiScaleAttention(12, 16, 2, stride_q=2, residual_pooling=False),
        (2, 20, 12),
        ((4, 5),),
    ),
    'mvit_rel_pos': (
        lambda: mvit.MultiScaleAttention(16, 16, 2, stride_kv=2, **REL_POS),
        (2, 16, 16),
        ((4, 4),),
    ),
    'mvit_resized': (
        lambda: mvit.MultiScaleAttention(16, 16, 2, stride_q=2, qkv_bias=False, **REL_POS),
        (2, 15, 16),
        ((3, 5),),
    ),
}


def randomized(module: nn.Module) -> nn.Module:
    """With every parameter random."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module
