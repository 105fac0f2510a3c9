# ViTDet in float: Mask R-CNN, plain ViT-B, simple feature pyramid (arXiv 2203.16527). The same as
# in mmdet's projects/ViTDet, whose model scores 51.6 box / 45.7 mask AP.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py', './coco_instance_lsj-1024.py',
    'mmdet::_base_/schedules/schedule_1x.py', 'mmdet::_base_/default_runtime.py',
]
norm_cfg = dict(type='gplq_mm.LN2d')
model = dict(
    backbone=dict(
        _delete_=True, type='mmpretrain.ViTSAM', img_size=1024, window_size=14, out_channels=0,
        drop_path_rate=0.1, norm_cfg=dict(type='LN', eps=1e-5),
        arch=dict(embed_dims=768, num_layers=12, num_heads=12, feedforward_channels=3072,
                  global_attn_indexes=[2, 5, 8, 11])),
    neck=dict(
        _delete_=True, type='gplq_mm.SimpleFeaturePyramid', backbone_channel=768,
        out_channels=256, num_outs=5, norm_cfg=norm_cfg),
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        bbox_head=dict(type='Shared4Conv1FCBBoxHead', conv_out_channels=256, norm_cfg=norm_cfg),
        mask_head=dict(norm_cfg=norm_cfg)))
optim_wrapper = dict(optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=0.1))
