# Float Mask R-CNN with a tiny ViTDet backbone, from scratch on handwritten digits.
_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py', 'mmdet::_base_/default_runtime.py',
          './_base_/digits_instance.py']
dims, channels, max_epochs = 192, 48, 5
arch = dict(embed_dims=dims, num_layers=6, num_heads=4, feedforward_channels=4 * dims,
            global_attn_indexes=[2, 5])
roi = dict(out_channels=channels, roi_layer=dict(sampling_ratio=1))
proposals = dict(nms_pre=200, max_per_img=100)
model = dict(
    backbone=dict(_delete_=True, type='mmpretrain.ViTSAM', arch=arch, img_size=160, window_size=5,
                  out_channels=0),
    neck=dict(_delete_=True, type='gplq_mm.SimpleFeaturePyramid', backbone_channel=dims,
              out_channels=channels, num_outs=5),
    rpn_head=dict(in_channels=channels, feat_channels=channels, anchor_generator=dict(scales=[6])),
    roi_head=dict(bbox_roi_extractor=roi, mask_roi_extractor=roi,
                  bbox_head=dict(in_channels=channels, fc_out_channels=256, num_classes=10),
                  mask_head=dict(num_convs=2, in_channels=channels, conv_out_channels=channels,
                                 num_classes=10, norm_cfg=dict(type='GN', num_groups=8))),
    train_cfg=dict(rpn_proposal=proposals, rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(rpn=proposals, rcnn=dict(max_per_img=30)))
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05, fused=True),
                     clip_grad=dict(max_norm=5))
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = [dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=100),
                   dict(type='CosineAnnealingLR', convert_to_iter_based=True)]
