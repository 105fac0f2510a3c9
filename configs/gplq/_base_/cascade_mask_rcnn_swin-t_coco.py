# Cascade Mask R-CNN in float with Swin-T, as Swin's own code trains it (50.4 box / 43.7 mask AP):
# four-convolution heads with BN, GIoU loss on decoded boxes. mmdet has no such config.
_base_ = [
    'mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py', 'mmdet::_base_/datasets/coco_instance.py',
    'mmdet::_base_/schedules/schedule_1x.py', 'mmdet::_base_/default_runtime.py',
]
bbox_heads = [
    dict(
        type='ConvFCBBoxHead', num_shared_convs=4, num_shared_fcs=1, in_channels=256,
        conv_out_channels=256, fc_out_channels=1024, roi_feat_size=7, num_classes=80,
        norm_cfg=dict(type='BN'), reg_class_agnostic=False, reg_decoded_bbox=True,
        bbox_coder=dict(
            type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4, target_stds=[xy, xy, wh, wh]),
        loss_cls=dict(type='CrossEntropyLoss', loss_weight=1.0),
        loss_bbox=dict(type='GIoULoss', loss_weight=10.0))
    for xy, wh in ((0.1, 0.2), (0.05, 0.1), (0.033, 0.067))
]
model = dict(
    backbone=dict(
        _delete_=True, type='SwinTransformer', embed_dims=96, depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24], window_size=7, drop_path_rate=0.2, convert_weights=True),
    neck=dict(in_channels=[96, 192, 384, 768]),
    roi_head=dict(bbox_head=bbox_heads))
