# DINOv2-S/14 at 224 px, frozen, with a linear head trained on ImageNet-1k, float.
_base_ = [
    'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py',
    'mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py',
    'mmpretrain::_base_/default_runtime.py',
]
checkpoint = (
    'https://download.openmmlab.com/mmpretrain/v1.0/dinov2/'
    'vit-small-p14_dinov2-pre_3rdparty_20230426-5641ca5a.pth')
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='VisionTransformer', arch='dinov2-small', img_size=224, patch_size=14,
        layer_scale_init_value=1e-5, frozen_stages=12,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone.')),
    head=dict(
        type='VisionTransformerClsHead', num_classes=1000, in_channels=384,
        loss=dict(type='CrossEntropyLoss')))
train_cfg = dict(max_epochs=10)
param_scheduler = [dict(type='CosineAnnealingLR', by_epoch=True, convert_to_iter_based=True)]
