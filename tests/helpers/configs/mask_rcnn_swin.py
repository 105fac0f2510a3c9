# Mask R-CNN with four Swin blocks, 16 and 32 dims: seconds on one core.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    './shapes_instance.py',
    'mmdet::_base_/default_runtime.py',
]
channels = 16
strides = [4, 8]
roi_extractor = dict(out_channels=channels, featmap_strides=strides, finest_scale=28)
model = dict(
    data_preprocessor=dict(pad_size_divisor=16),
    backbone=dict(
        _delete_=True,
        type='SwinTransformer',
        embed_dims=16,
        depths=[2, 2],
        num_heads=[2, 4],
        strides=(4, 2),
        out_indices=(0, 1),
        window_size=4,
        mlp_ratio=2,
        drop_path_rate=0.0,
        convert_weights=False,
    ),
    neck=dict(in_channels=[16, 32], out_channels=channels, num_outs=2),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        anchor_generator=dict(scales=[4], ratios=[1.0], strides=strides),
    ),
    roi_head=dict(
        bbox_roi_extractor=roi_extractor,
        bbox_head=dict(in_channels=channels, fc_out_channels=32, num_classes=2),
        mask_roi_extractor=roi_extractor,
        mask_head=dict(
            num_convs=1, in_channels=channels, conv_out_channels=channels, num_classes=2
        ),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=100, max_per_img=50), rcnn=dict(sampler=dict(num=32))),
    test_cfg=dict(rpn=dict(nms_pre=100, max_per_img=30), rcnn=dict(max_per_img=10)),
)
