# FP32 Mask R-CNN with a tiny ViTDet backbone on handwritten digits, from scratch: minutes on two cores.
_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py', './_base_/digits_instance.py', 'mmdet::_base_/default_runtime.py']
dims, channels = 96, 48
arch = dict(embed_dims=dims, num_layers=6, num_heads=4, feedforward_channels=4 * dims, global_attn_indexes=[2, 5])
model = dict(
    backbone=dict(_delete_=True, type='mmpretrain.ViTSAM', arch=arch, img_size=160, patch_size=8, window_size=5, out_channels=0),
    neck=dict(_delete_=True, type='gplq_mm.SimpleFeaturePyramid', backbone_channel=dims, in_channels=[dims // 4, dims // 2, dims, dims], out_channels=channels, num_outs=4),
    rpn_head=dict(in_channels=channels, feat_channels=channels,
                  anchor_generator=dict(scales=[8], ratios=[1.0, 2.0], strides=[2, 4, 8, 16])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels, featmap_strides=[2, 4, 8, 16], finest_scale=20),
        bbox_head=dict(in_channels=channels, fc_out_channels=256, num_classes=10),
        mask_roi_extractor=dict(out_channels=channels, featmap_strides=[2, 4, 8, 16], finest_scale=20),
        mask_head=dict(num_convs=2, in_channels=channels, conv_out_channels=channels, num_classes=10)),
    train_cfg=dict(rpn_proposal=dict(nms_pre=200, max_per_img=100), rcnn=dict(sampler=dict(num=48))),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100), rcnn=dict(max_per_img=30)))
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=8, val_interval=4)
val_cfg = test_cfg = dict()
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05), clip_grad=dict(max_norm=5.0))
param_scheduler = [dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=100),
                   dict(type='CosineAnnealingLR', begin=0, end=8, T_max=8, convert_to_iter_based=True)]
