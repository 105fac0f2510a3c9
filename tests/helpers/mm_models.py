# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Models of mmpretrain and mmdet, small enough for a second on one core."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from gplq_mm.integrations.loading import load_adapters
from tests.helpers.calibration import calibrate_activations, calibrate_weights, tensors

__all__ = ['calibrate_activations', 'calibrate_weights', 'tensors']

register_all_modules(init_default_scope=False)
load_adapters()
_BLOCK = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32)
_SWIN = dict(embed_dims=8, depths=[2, 2], num_heads=[2, 4])
_CHANNELS, _STRIDES = 16, [4, 8]

CLASSIFIERS = {
    'vit': (dict(type='VisionTransformer', arch=_BLOCK, img_size=32, patch_size=8), 32),
    'deit': (
        dict(type='DistilledVisionTransformer', arch=_BLOCK, img_size=32, patch_size=8),
        32,
    ),
    'deit3': (dict(type='DeiT3', arch=_BLOCK, img_size=32, patch_size=8), 32),
    'dinov2': (
        dict(
            type='VisionTransformer',
            arch=_BLOCK,
            img_size=32,
            patch_size=8,
            layer_cfgs=dict(ffn_type='swiglu_fused'),
            layer_scale_init_value=1e-2,
        ),
        32,
    ),
    'dinov2_mlp': (
        dict(
            type='VisionTransformer',
            arch=_BLOCK,
            img_size=32,
            patch_size=8,
            layer_scale_init_value=1e-2,
        ),
        32,
    ),
    'mae': (
        dict(
            type='VisionTransformer',
            arch=_BLOCK,
            img_size=32,
            patch_size=8,
            out_type='avg_featmap',
            final_norm=False,
        ),
        32,
    ),
    'eva02_plain': (dict(type='ViTEVA02', arch=_BLOCK, img_size=32, patch_size=8), 32),
    'eva02': (dict(type='ViTEVA02', arch=_BLOCK, img_size=32, patch_size=8, sub_ln=True), 32),
    'beit': (dict(type='BEiTViT', arch=_BLOCK, img_size=32, patch_size=8), 32),
    'beit_shared': (
        dict(
            type='BEiTViT',
            arch=_BLOCK,
            img_size=32,
            patch_size=8,
            out_type='avg_featmap',
            use_rel_pos_bias=False,
            use_shared_rel_pos_bias=True,
        ),
        32,
    ),
    'swin': (
        dict(
            type='SwinTransformer',
            arch=_SWIN,
            img_size=32,
            patch_size=2,
            window_size=4,
            out_indices=(1,),
            pad_small_map=True,
        ),
        32,
    ),
    'swin_v2': (
        dict(
            type='SwinTransformerV2',
            arch=dict(**_SWIN, extra_norm_every_n_blocks=0),
            img_size=32,
            patch_size=2,
            window_size=[4, 4],
            out_indices=(1,),
        ),
        32,
    ),
}
"""Name -> backbone config, image size."""


def build(cfg: dict[str, Any], scope: str, seed: int = 0) -> nn.Module:
    """Build a model with every parameter random (zero tables would hide errors)."""
    with DefaultScope.overwrite_default_scope(scope):
        torch.manual_seed(seed)
        model = MODELS.build(ConfigDict(copy.deepcopy(cfg)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(('table', 'rel_pos_h', 'rel_pos_w', 'bias', 'biases', 'token')):
                parameter.normal_(std=0.2)
    model.eval()  # mmpretrain's backbones return None here
    return model


def classifier(name: str) -> nn.Module:
    """ImageClassifier with the head that belongs to the backbone."""
    backbone, _ = CLASSIFIERS[name]
    head: dict[str, Any] = dict(type='VisionTransformerClsHead', num_classes=4, in_channels=16)
    neck = None
    if name == 'deit':
        head['type'] = 'DeiTClsHead'
    elif name.startswith(('beit', 'eva02', 'mae')):
        head['type'] = 'LinearClsHead'
    elif name.startswith('swin'):
        head.update(type='LinearClsHead')
        neck = dict(type='GlobalAveragePooling')
    cfg = dict(type='ImageClassifier', backbone=backbone, neck=neck, head=head)
    return build(cfg, 'mmpretrain')


def vit_sam(**options: Any) -> nn.Module:
    """ViTSAM with a window block and a global block."""
    cfg = dict(
        type='ViTSAM',
        arch={**_BLOCK, 'global_attn_indexes': [1]},
        img_size=32,
        patch_size=4,
        out_channels=8,
        window_size=3,
        use_rel_pos=True,
    )
    return build({**cfg, **options}, 'mmpretrain')


def _swin_neck() -> dict[str, Any]:
    backbone = dict(
        type='SwinTransformer',
        embed_dims=8,
        depths=[2, 2],
        num_heads=[2, 4],
        strides=(4, 2),
        out_indices=(0, 1),
        window_size=4,
        mlp_ratio=2,
        convert_weights=False,
    )
    neck = dict(type='FPN', in_channels=[8, 16], out_channels=_CHANNELS, num_outs=2)
    preprocessor = dict(type='DetDataPreprocessor')
    return dict(data_preprocessor=preprocessor, backbone=backbone, neck=neck)


def _two_stage(bbox_head: Any, roi_head: dict[str, Any]) -> dict[str, Any]:
    extractor = dict(
        type='SingleRoIExtractor',
        roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0),
        out_channels=_CHANNELS,
        featmap_strides=_STRIDES,
    )
    anchors = dict(type='AnchorGenerator', scales=[4], ratios=[1.0], strides=_STRIDES)
    coder = dict(type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds=[1.0] * 4)
    rpn = dict(
        type='RPNHead',
        in_channels=_CHANNELS,
        feat_channels=_CHANNELS,
        anchor_generator=anchors,
        bbox_coder=coder,
    )
    mask = dict(
        type='FCNMaskHead', num_convs=1, in_channels=16, conv_out_channels=16, num_classes=2
    )
    roi = dict(
        bbox_roi_extractor=extractor,
        bbox_head=bbox_head,
        mask_roi_extractor=extractor,
        mask_head=mask,
        **roi_head,
    )
    nms = dict(type='nms', iou_threshold=0.7)
    test_cfg = dict(
        rpn=dict(nms_pre=20, max_per_img=4, nms=nms, min_bbox_size=0),
        rcnn=dict(score_thr=0.0, nms=nms, max_per_img=3, mask_thr_binary=0.5),
    )
    return dict(**_swin_neck(), rpn_head=rpn, roi_head=roi, train_cfg=None, test_cfg=test_cfg)


def _bbox_head() -> dict[str, Any]:
    coder = dict(type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds=[0.1] * 4)
    return dict(
        type='Shared2FCBBoxHead',
        in_channels=_CHANNELS,
        fc_out_channels=16,
        num_classes=2,
        bbox_coder=coder,
    )


def mask_rcnn() -> nn.Module:
    """MaskRCNN with mmdet's Swin."""
    roi = dict(type='StandardRoIHead')
    return build(dict(type='MaskRCNN', **_two_stage(_bbox_head(), roi)), 'mmdet')


def cascade_rcnn() -> nn.Module:
    """Cascade Mask R-CNN with two stages."""
    roi = dict(type='CascadeRoIHead', num_stages=2, stage_loss_weights=[1, 0.5])
    return build(dict(type='CascadeRCNN', **_two_stage([_bbox_head()] * 2, roi)), 'mmdet')


def retinanet() -> nn.Module:
    """RetinaNet with mmdet's Swin."""
    anchors = dict(type='AnchorGenerator', scales=[4], ratios=[1.0], strides=_STRIDES)
    coder = dict(type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds=[1.0] * 4)
    head = dict(
        type='RetinaHead',
        num_classes=2,
        in_channels=_CHANNELS,
        feat_channels=_CHANNELS,
        stacked_convs=1,
        anchor_generator=anchors,
        bbox_coder=coder,
    )
    return build(dict(type='RetinaNet', **_swin_neck(), bbox_head=head), 'mmdet')


DETECTORS: dict[str, Callable[[], nn.Module]] = {
    'mask_rcnn': mask_rcnn,
    'cascade_rcnn': cascade_rcnn,
    'retinanet': retinanet,
}


def run_detector(model: nn.Module, images: Tensor) -> Any:
    """The whole network on ``(B, 3, H, W)``, raw outputs (mode ``tensor``)."""
    samples = []
    for image in images:
        shape = tuple(image.shape[-2:])
        meta = dict(img_shape=shape, ori_shape=shape, batch_input_shape=shape, scale_factor=(1, 1))
        samples.append(DetDataSample(metainfo=meta))
    return model(images, samples, mode='tensor')
