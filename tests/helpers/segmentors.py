# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Backbones, attention classes and segmentors of mmseg, small enough for a second on one core."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from mmseg.models.backbones import beit, mae, mit, swin, twins
from mmseg.models.decode_heads import ann_head, da_head, isa_head, ocr_head
from mmseg.models.utils import SelfAttentionBlock
from mmseg.utils import register_all_modules
from torch import nn

from tests.helpers.backbones import TWINS
from tests.helpers.mm_models import build

register_all_modules(init_default_scope=False)

TOKENS, MAP = (2, 9, 16), (2, 8, 4, 5)
MASK = torch.where(torch.rand(2, 9, 9, generator=torch.Generator().manual_seed(0)) > 0.5, 0, -100)
NORM = dict(type='BN', requires_grad=True)
LAYERS: dict[str, Any] = dict(conv_cfg=None, norm_cfg=NORM, act_cfg=dict(type='ReLU'))


def _block(**options: Any) -> nn.Module:
    given = dict(
        key_in_channels=8,
        query_in_channels=8,
        channels=6,
        out_channels=8,
        share_key_query=False,
        query_downsample=None,
        key_downsample=None,
        key_query_num_convs=1,
        value_out_num_convs=1,
        key_query_norm=True,
        value_out_norm=False,
        matmul_norm=True,
        with_out=True,
    )
    return SelfAttentionBlock(**{**given, **LAYERS, **options})


ATTENTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[Any, ...]]] = {
    'seg_window': (lambda: swin.WindowMSA(16, 2, (3, 3), attn_drop_rate=0.2), (4, 9, 16), ()),
    'seg_window_mask': (lambda: swin.WindowMSA(16, 2, (3, 3)), (4, 9, 16), (MASK,)),
    'seg_shift': (lambda: swin.ShiftWindowMSA(16, 2, 3, 1), (2, 20, 16), ((4, 5),)),
    'seg_beit': (lambda: beit.BEiTAttention(16, 2, (2, 4), attn_drop_rate=0.2), TOKENS, ()),
    'seg_beit_bias': (lambda: beit.BEiTAttention(16, 2, (2, 4), bias=True), TOKENS, ()),
    'seg_mae': (lambda: mae.MAEAttention(16, 2, (2, 4), bias=True), TOKENS, ()),
    'seg_efficient': (
        lambda: mit.EfficientMultiheadAttention(16, 2, sr_ratio=2, qkv_bias=True),
        (2, 24, 16),
        ((4, 6),),
    ),
    'seg_efficient_1': (
        lambda: mit.EfficientMultiheadAttention(16, 2, attn_drop=0.2),
        (2, 6, 16),
        ((2, 3),),
    ),
    'seg_subsampled': (
        lambda: twins.GlobalSubsampledAttention(16, 2, sr_ratio=2),
        (2, 24, 16),
        ((4, 6),),
    ),
    'seg_grouped': (
        lambda: twins.LocallyGroupedSelfAttention(16, 2, attn_drop_rate=0.2, window_size=3),
        (2, 20, 16),
        ((4, 5),),
    ),
    'seg_block': (_block, MAP, (torch.linspace(-1, 1, 320).view(2, 8, 4, 5),)),
    'seg_block_plain': (
        lambda: _block(key_query_norm=False, matmul_norm=False, with_out=False),
        MAP,
        (torch.linspace(-1, 1, 320).view(2, 8, 4, 5),),
    ),
    'seg_ann': (
        lambda: ann_head.SelfAttentionBlock(8, 8, 6, 8, False, 1, (1, 2), **LAYERS),
        MAP,
        (torch.linspace(-1, 1, 320).view(2, 8, 4, 5),),
    ),
    'seg_isa': (lambda: isa_head.SelfAttentionBlock(8, 6, **LAYERS), MAP, ()),
    'seg_ocr': (
        lambda: ocr_head.ObjectAttentionBlock(8, 6, 1, **LAYERS),
        MAP,
        (torch.linspace(-1, 1, 48).view(2, 8, 3, 1),),
    ),
    'seg_pam': (lambda: da_head.PAM(8, 4), MAP, ()),
    'seg_cam': (da_head.CAM, MAP, ()),
}
"""As ``tests.helpers.attentions.ATTENTIONS``: how to make it, its input, its other arguments."""
IN_NO_SEGMENTOR = (
    'seg_beit',
    'seg_mae',
    'seg_grouped',
    'seg_block_plain',
    'seg_ann',
    'seg_isa',
    'seg_pam',
    'seg_cam',
)
"""Of ``ATTENTIONS`` those that no model of ``SEGMENTORS`` contains."""

_TWINS = dict(**TWINS, out_indices=(0, 1))
_VIT = dict(
    img_size=32,
    patch_size=8,
    embed_dims=16,
    num_layers=2,
    num_heads=2,
    mlp_ratio=2,
    out_indices=(1,),
)

BACKBONES: dict[str, tuple[dict[str, Any], int]] = {
    'seg_swin': (
        dict(
            type='SwinTransformer',
            embed_dims=8,
            depths=[2, 2],
            num_heads=[2, 4],
            strides=(4, 2),
            out_indices=(0, 1),
            window_size=4,
            mlp_ratio=2,
        ),
        32,
    ),
    'seg_beit': (dict(type='BEiT', **_VIT, qv_bias=True), 32),
    'seg_vit': (dict(type='VisionTransformer', **_VIT), 32),
    'seg_mit': (
        dict(
            type='MixVisionTransformer',
            embed_dims=8,
            num_stages=2,
            num_layers=[1, 1],
            num_heads=[1, 2],
            patch_sizes=[7, 3],
            strides=[4, 2],
            sr_ratios=[2, 1],
            out_indices=(0, 1),
            mlp_ratio=2,
        ),
        32,
    ),
    'seg_svt': (dict(type='SVT', **_TWINS, windiow_sizes=[3, 2]), 32),
}
"""Name -> config, image size."""
PRODUCTS = {
    'seg_swin': 2 * 4,
    'seg_beit': 2 * 2,
    'seg_vit': 2 * 2,
    'seg_mit': 2 * 2,
    'seg_svt': 2 * 3,
}
"""Name -> matrix products of its attentions."""


def backbone(name: str) -> nn.Module:
    """The backbone alone, no branch scaled down to nothing."""
    model = build(BACKBONES[name][0], 'mmseg')
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if 'gamma' in key:
                parameter.uniform_(0.5, 1.5)
    return model


def _head(kind: str, **options: Any) -> dict[str, Any]:
    return dict(
        type=kind,
        **{
            **dict(
                in_channels=[8, 16],
                in_index=[0, 1],
                channels=8,
                num_classes=3,
                dropout_ratio=0.1,
                norm_cfg=NORM,
                align_corners=False,
                loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
            ),
            **options,
        },
    )


_ONE = dict(in_channels=16, in_index=1)
_HEADS: dict[str, Any] = {
    'upernet': _head('UPerHead', pool_scales=(1, 2)),
    'segformer': _head('SegformerHead'),
    'segmenter': _head(
        'SegmenterMaskTransformerHead',
        in_channels=16,
        in_index=0,
        num_layers=1,
        num_heads=2,
        embed_dims=16,
        mlp_ratio=2,
        norm_cfg=dict(type='LN'),
    ),
    'ocrnet': [
        _head('FCNHead', **_ONE, num_convs=1, concat_input=False),
        _head('OCRHead', **_ONE, ocr_channels=6),
    ],
}
_BACKBONE_OF = {
    'upernet': 'seg_swin',
    'segformer': 'seg_mit',
    'segmenter': 'seg_vit',
    'ocrnet': 'seg_swin',
}


def segmentor_cfg(name: str) -> dict[str, Any]:
    """Config of one of ``SEGMENTORS``, with the size of its images in ``test_cfg``."""
    heads = copy.deepcopy(_HEADS[name])
    cascade = isinstance(heads, list)
    return dict(
        type='CascadeEncoderDecoder' if cascade else 'EncoderDecoder',
        **(dict(num_stages=len(heads)) if cascade else {}),
        data_preprocessor=dict(type='SegDataPreProcessor', size=(32, 32), seg_pad_val=255),
        backbone=copy.deepcopy(BACKBONES[_BACKBONE_OF[name]][0]),
        decode_head=heads,
        auxiliary_head=_head('FCNHead', in_channels=16, in_index=-1, num_convs=1),
        train_cfg=dict(),
        test_cfg=dict(mode='whole'),
    )


def segmentor(name: str) -> nn.Module:
    """A segmentor with all parts."""
    return build(segmentor_cfg(name), 'mmseg')


SEGMENTORS: dict[str, Callable[[], nn.Module]] = {
    name: (lambda name=name: segmentor(name)) for name in _HEADS
}
ALL_NAMES = {*ATTENTIONS, *BACKBONES, *SEGMENTORS}
